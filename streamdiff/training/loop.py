"""The training loop of all recipes: optimiser steps, EMA, checkpoints, and a stop at any moment.

A `Task` computes gradients; the loop does the rest. What a step does depends on its number alone: noise and clips are
drawn by counters (`streamdiff.rng`), the learning rate follows the number of the step and never the clock. So a run
that was stopped and resumed, at whatever step, ends with the same bits as one that was not.

In the folder of a run lie

    checkpoint.safetensors   weights, averages, moments; written beside and moved into place, so it is whole or old
    log.jsonl                one line a step
    curves.png               what the log says, for people who look

A budget in minutes becomes a number of steps once: the first steps are timed, the number is fixed and kept in the
checkpoint, and a resumed run follows the same schedule.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from streamdiff.checkpoint import check_names_and_shapes
from streamdiff.errors import CheckpointError, ConfigError, StreamdiffError
from streamdiff.facts import Facts, parse_json, printable
from streamdiff.output import make_folder
from streamdiff.tensorfile import is_finite, listed, save_tensors
from streamdiff.training.history import Log, draw_curves

logger = logging.getLogger(__name__)

CHECKPOINT, LOG, CURVES = "checkpoint.safetensors", "log.jsonl", "curves.png"

_FORMAT = "1"
_SAME_SIGNAL_S = 0.5
_SETTLING_STEPS, _TIMED_STEPS = 2, 8
_BUDGET_SHARE = 0.92
"""Share of a budget that is planned for steps; the rest is for checkpoints, samples and a machine that slows down."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """A module that learns, and how. Parameters that require no gradient stay as they are and are not saved."""

    module: nn.Module
    lr: float = 1.2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    """Not for biases and norms."""
    clip_norm: float = 1.0
    """The gradient of the whole part is made no longer than this."""
    average: float = 0.998
    """Decay of the exponential moving average (EMA) of the weights; 0: no average."""
    final_lr: float = 0.0
    """Share of the learning rate that is left at the last step."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.clip_norm > 0 and 0 <= self.average < 1 and 0 <= self.final_lr <= 1):
            raise ConfigError(
                "a part learns with lr > 0, clip_norm > 0, average in [0, 1) and final_lr in [0, 1], got "
                f"{self.lr}, {self.clip_norm}, {self.average} and {self.final_lr}"
            )


class Task(Protocol):
    """A training task: modules that learn, and their gradients."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """The modules that learn, by name."""
        ...

    def gradients(self, step: int) -> Mapping[str, float]:
        """Leave the gradients of step ``step`` in the parameters; a part that gets none rests.

        Everything random in it is keyed by ``step``. Returns numbers for the log, ``loss`` first.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long a run is: so many steps, or as many as fit in a time."""

    steps: int | None = None
    budget_s: float | None = None
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.budget_s is None):
            raise ConfigError("a run is planned by steps or by a budget of time; give one of the two")
        if (self.steps is not None and self.steps < 1) or (self.budget_s is not None and self.budget_s <= 0):
            raise ConfigError(f"a run takes at least one step and some time, got {self.steps} and {self.budget_s} s")
        if self.warmup_steps < 1:
            raise ConfigError(f"warmup_steps must be at least 1, got {self.warmup_steps}")


def learning_rate(step: int, *, total: int | None, warmup_steps: int, final: float = 0.0) -> float:
    """Share of the full learning rate at a step: a straight line up, then a cosine down to ``final``.

    While ``total`` is not known yet, the line alone. The line takes a fifth of the run at most.

    >>> [round(learning_rate(s, total=100, warmup_steps=10), 2) for s in (0, 4, 9, 55, 99)]
    [0.1, 0.5, 1.0, 0.49, 0.0]
    """
    if total is None:
        return min(1.0, (step + 1) / warmup_steps)
    rise = max(1, min(warmup_steps, total // 5))
    if step < rise:
        return (step + 1) / rise
    fallen = min(1.0, (step + 1 - rise) / (total + 1 - rise))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * fallen))


def steps_within(budget_s: float, *, done: int, spent_s: float, step_s: float) -> int:
    """How many steps a run has when ``done`` took ``spent_s`` and each of the others takes ``step_s``.

    >>> steps_within(600, done=10, spent_s=20, step_s=1)
    542
    """
    return done + max(1, int((_BUDGET_SHARE * budget_s - spent_s + 1e-9) / step_s) if step_s > 0 else 1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why `Trainer.train` came back."""

    step: int
    total: int | None
    stopped_by: int | None
    """Signal that asked for it, or None when the run is complete."""


OnStep = Callable[[int, int | None, Mapping[str, float]], None]
"""Told after every step: steps done, steps in all once that is known, the numbers of the step."""
OnSample = Callable[[int], None]
"""Told now and then: steps done."""


class _Learner:
    """Optimiser and exponential moving average (EMA) of a part."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.parameters = {name: p for name, p in part.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError("a part has no parameter that requires a gradient; there is nothing to learn")
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        others = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((matrices, part.weight_decay), (others, 0.0))
            if params
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=part.lr, betas=part.betas, fused=True)
        self.updates = 0
        self.average = [p.detach().clone() for p in self.parameters.values()] if part.average else []

    @property
    def buffers(self) -> dict[str, Tensor]:
        kept = self.part.module.state_dict().keys()
        return {name: b for name, b in self.part.module.named_buffers() if name in kept}

    def clip(self) -> float | None:
        """Clip the gradient norm; its length before, None where there is no gradient."""
        found = [p for p in self.parameters.values() if p.grad is not None]
        return float(torch.nn.utils.clip_grad_norm_(found, self.part.clip_norm)) if found else None

    @torch.no_grad()
    def update(self, lr_share: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.part.lr * lr_share
        self.optimiser.step()
        self.updates += 1
        if self.average:
            # A young average would remember the random weights it began with.
            keep = min(self.part.average, (1 + self.updates) / (10 + self.updates))
            for average, p in zip(self.average, self.parameters.values(), strict=True):
                average.lerp_(p, 1.0 - keep)

    def tensors(self) -> dict[str, Tensor]:
        """All that it knows, by name."""
        found = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        found |= {f"buffer/{name}": b for name, b in self.buffers.items()}
        found |= {f"average/{name}": a for name, a in zip(self.parameters, self.average, strict=False)}
        for name, p in self.parameters.items():
            for key, value in self.optimiser.state.get(p, {}).items():
                found[f"{key}/{name}"] = value
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], updates: int, *, what: str) -> None:
        optimiser_keys = ("step", "exp_avg", "exp_avg_sq")
        fixed = {n: t for n, t in tensors.items() if n.split("/", 1)[0] not in optimiser_keys}
        own = {n: t for n, t in self.tensors().items() if n.split("/", 1)[0] not in optimiser_keys}
        check_names_and_shapes(
            {n: tuple(t.shape) for n, t in own.items()}, {n: tuple(t.shape) for n, t in fixed.items()}, what=what
        )
        self._check_optimiser({n: t for n, t in tensors.items() if n not in fixed}, what=what)
        if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
            raise CheckpointError(f"{what} holds NaN or infinity ({listed(broken)}); begin anew, or from an older one")
        for name, target in own.items():
            target.copy_(tensors[name])
        for name, p in self.parameters.items():
            if f"step/{name}" in tensors:
                self.optimiser.state[p] = {key: tensors[f"{key}/{name}"].to(p.device) for key in optimiser_keys}
        self.updates = updates

    def _check_optimiser(self, moments: Mapping[str, Tensor], *, what: str) -> None:
        """Raise `CheckpointError` unless each parameter has all of an optimiser's moments, or none of them."""
        expected: dict[str, tuple[int, ...]] = {}
        for name, p in self.parameters.items():
            if any(f"{key}/{name}" in moments for key in ("step", "exp_avg", "exp_avg_sq")):
                expected |= {
                    f"step/{name}": (),
                    f"exp_avg/{name}": tuple(p.shape),
                    f"exp_avg_sq/{name}": tuple(p.shape),
                }
        check_names_and_shapes(expected, {n: tuple(t.shape) for n, t in moments.items()}, what=what)
        negative = [n for n, t in moments.items() if not n.startswith("exp_avg/") and t.numel() and float(t.min()) < 0]
        other = [n for n, t in moments.items() if not t.is_floating_point()]
        if negative or other:
            raise CheckpointError(f"{what} holds no moments of an optimiser ({listed(negative + other)}); begin anew")


class Trainer:
    """A training run, kept in a folder.

    Args:
        facts: what the run must be resumed with (recipe, preset, seed, ...), as short texts.

    Raises:
        ConfigError: the folder holds another run, or this one and ``resume`` is False.
        CheckpointError: its checkpoint cannot be read or is of another model.
    """

    def __init__(
        self, task: Task, folder: Path, plan: Plan, *, facts: Mapping[str, str] | None = None, resume: bool = False
    ) -> None:
        self.task = task
        self.folder = folder
        self.plan = plan
        self.facts = dict(facts or {})
        self.step = 0
        self.total = plan.steps
        self.spent_s = 0.0
        self._learners = {name: _Learner(part) for name, part in task.parts.items()}
        self._timed: list[float] = []
        make_folder(folder)
        if self.checkpoint.is_file():
            self._restore(resume)
        self._log = Log(folder / LOG, self.step)

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    @property
    def history(self) -> Mapping[str, Sequence[tuple[int, float]]]:
        """Every number of the log: steps and values."""
        return self._log.history

    def note(self, numbers: Mapping[str, float]) -> None:
        """Add numbers to the log that belong to the last step: what was measured beside it."""
        self._log.write(self.step - 1, numbers, lr={})

    def average(self, part: str) -> dict[str, Tensor]:
        """State dict of a part with the running average in place of what was learned last; shares no memory."""
        learner = self._learners[part]
        state = {name: tensor.detach().clone() for name, tensor in learner.part.module.state_dict().items()}
        state |= {name: a.clone() for name, a in zip(learner.parameters, learner.average, strict=False)}
        return state

    @contextlib.contextmanager
    def averaged(self, part: str) -> Generator[nn.Module]:
        """The module with its average inside, for as long as the context lasts; afterwards the same bits as before."""
        learner = self._learners[part]
        kept = [p.detach().clone() for p in learner.parameters.values()]
        try:
            with torch.no_grad():
                for p, a in zip(learner.parameters.values(), learner.average, strict=False):
                    p.copy_(a)
            yield learner.part.module
        finally:
            with torch.no_grad():
                for p, k in zip(learner.parameters.values(), kept, strict=True):
                    p.copy_(k)

    def train(
        self,
        *,
        on_step: OnStep | None = None,
        on_sample: OnSample | None = None,
        save_every_s: float = 120.0,
        sample_every_s: float = 120.0,
    ) -> Outcome:
        """Run until the plan is fulfilled, or a signal (Ctrl-C, SIGTERM) asks to stop after the step; saves either way.

        Raises StreamdiffError when a number stops being finite; the weights are then still those before the step.
        """
        saved_at = sampled_at = time.monotonic()
        with _asked_to_stop() as asked:
            while (self.total is None or self.step < self.total) and not asked:
                began = time.monotonic()
                numbers = self._learn()
                now = time.monotonic()
                self.spent_s += now - began
                self._settle_total(now - began)
                if on_step is not None:
                    on_step(self.step, self.total, numbers)
                done = self.total is not None and self.step >= self.total
                if done or asked or now - saved_at >= save_every_s:
                    self.save()
                    saved_at = time.monotonic()
                if on_sample is not None and not asked and (done or now - sampled_at >= sample_every_s):
                    on_sample(self.step)
                    sampled_at = time.monotonic()
                    self._log.flush()
                self.spent_s += time.monotonic() - now
        draw_curves(self._log.history, self.folder / CURVES)
        return Outcome(self.step, self.total, asked[0] if asked else None)

    def _learn(self) -> dict[str, float]:
        for learner in self._learners.values():
            learner.optimiser.zero_grad(set_to_none=True)
        numbers = dict(self.task.gradients(self.step))
        for name, learner in self._learners.items():
            norm = learner.clip()
            if norm is not None:
                numbers[f"gradient_{name}"] = norm
        broken = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if broken:
            raise StreamdiffError(
                f"step {self.step}: {', '.join(broken)}; the learning rate is too high or the data is not finite. "
                f"The last checkpoint ({self.checkpoint}) is sound; begin a new run with a lower --lr"
            )
        shares: dict[str, float] = {}
        for name, learner in self._learners.items():
            if f"gradient_{name}" in numbers:
                part = learner.part
                shares[name] = learning_rate(
                    self.step, total=self.total, warmup_steps=self.plan.warmup_steps, final=part.final_lr
                )
                learner.update(shares[name])
        self._log.write(self.step, numbers, lr={n: self._learners[n].part.lr * s for n, s in shares.items()})
        self.step += 1
        return numbers

    def _settle_total(self, took_s: float) -> None:
        if self.total is not None or self.plan.budget_s is None:
            return
        self._timed.append(took_s)
        if len(self._timed) == _SETTLING_STEPS + _TIMED_STEPS:
            step_s = statistics.median(self._timed[_SETTLING_STEPS:])
            self.total = steps_within(self.plan.budget_s, done=self.step, spent_s=self.spent_s, step_s=step_s)
            logger.info("a step takes %.3f s: %d steps in all", step_s, self.total)

    def save(self) -> None:
        """Write the checkpoint and the curves; whoever kills the process meanwhile finds the checkpoint before."""
        tensors: dict[str, Tensor] = {}
        for name, learner in self._learners.items():
            for key, tensor in learner.tensors().items():
                # A copy: safetensors refuses tensors that share memory, as tied weights and views do.
                tensors[f"{name}/{key}"] = tensor.detach().cpu().clone().contiguous()
        about = {
            "format": _FORMAT,
            "step": str(self.step),
            "total": "" if self.total is None else str(self.total),
            "spent_s": f"{self.spent_s:.3f}",
            "updates": json.dumps({name: learner.updates for name, learner in self._learners.items()}),
            "facts": json.dumps(self.facts),
        }
        self._log.flush()
        save_tensors(tensors, self.checkpoint, about)
        draw_curves(self._log.history, self.folder / CURVES)

    def _restore(self, resume: bool) -> None:
        about, tensors = _read(self.checkpoint)
        step, total, spent_s, updates, facts = _told(about, self.checkpoint)
        if not resume:
            raise ConfigError(
                f"{self.folder} holds a run at step {step}; add --resume to go on, or choose another --out"
            )
        self._check_same_run(facts, total)
        if updates.keys() != self._learners.keys():
            raise CheckpointError(
                f"{self.checkpoint} holds {sorted(updates)} but {sorted(self._learners)} learn here; it is of another "
                "recipe"
            )
        if strange := [name for name in tensors if name.partition("/")[0] not in self._learners]:
            raise CheckpointError(f"{self.checkpoint} holds tensors of nothing that learns here ({listed(strange)})")
        for name, learner in self._learners.items():
            own = {n.split("/", 1)[1]: t for n, t in tensors.items() if n.split("/", 1)[0] == name}
            learner.restore(own, updates[name], what=f"{self.checkpoint} ({name})")
        self.step, self.spent_s = step, spent_s
        self.total = total if total is not None else self.total

    def _check_same_run(self, facts: Mapping[str, str], total: int | None) -> None:
        """Raise ConfigError when a checkpoint with these facts and this plan is of another run."""
        other = [
            f"{name} was {facts.get(name)!r} and is {self.facts.get(name)!r}"
            for name in sorted(facts.keys() | self.facts.keys())
            if facts.get(name) != self.facts.get(name)
        ]
        if other:
            raise ConfigError(
                f"{self.folder} holds another run ({'; '.join(other)}); resume with the same, or choose another --out"
            )
        if total is not None and self.plan.steps is not None and self.plan.steps != total:
            raise ConfigError(
                f"the run in {self.folder} was planned for {total} steps, not {self.plan.steps}, and its learning rate "
                f"follows that plan; resume it as it is, or begin another with --init"
            )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a checkpoint says of itself, and its tensors. Raises CheckpointError when it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        # A stranger's bytes may fail anywhere inside the reader.
        raise CheckpointError(f"cannot read {path} ({printable(error)}); remove it to begin anew") from error
    if about.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of a run; choose another folder")
    return about, tensors


_MOST_STEPS = 10**9


def _told(about: Mapping[str, str], path: Path) -> tuple[int, int | None, float, dict[str, int], dict[str, str]]:
    """Steps done and planned, seconds spent, updates by part, facts of the run. Raises CheckpointError."""

    def fail(why: str) -> NoReturn:
        raise CheckpointError(f"{path} does not say how far its run is: {why}; remove it to begin anew")

    try:
        numbers = {
            name: parse_json(about[name]) for name in ("step", "total", "spent_s") if about[name] or name != "total"
        }
        tables = {name: parse_json(about[name]) for name in ("updates", "facts")}
    except KeyError as error:
        fail(f"{error} is missing")
    except ValueError as error:
        fail(printable(error))
    told = Facts(numbers, fail)
    updates, facts = (Facts(table, fail, f"{name}.") for name, table in tables.items())
    step = told.whole("step", 0, _MOST_STEPS)
    total = told.whole("total", max(1, step), _MOST_STEPS) if "total" in numbers else None
    return (
        step,
        total,
        told.number("spent_s", 0, 1e10),
        {name: updates.whole(name, 0, step) for name in updates.names},
        {name: facts.words(name, 10_000) for name in facts.names},
    )


@contextlib.contextmanager
def _asked_to_stop() -> Generator[list[int]]:
    """A list that a first SIGINT or SIGTERM is put into; a later one ends the process as it always does.

    A launcher passes on what the terminal has sent already, so one that follows at once is the same. In a thread
    other than the main one signals are somebody else's business.
    """
    asked: list[int] = []
    since: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        if not asked:
            asked.append(number)
            since.append(time.monotonic())
        elif time.monotonic() - since[0] > _SAME_SIGNAL_S:
            for each, handler in before.items():
                signal.signal(each, handler)
            signal.raise_signal(number)

    try:
        for number in before:
            signal.signal(number, note)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
