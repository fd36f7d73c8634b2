"""The motion model: ``streamdiff train motion`` by flow matching, ``motion-consistency`` to two steps.

    streamdiff train motion --data run/speech --facegood facegood_audio2rig.npz --out run/motion --budget 52min
    streamdiff train motion-consistency --data run/speech --init run/motion/motion.safetensors --out run/two-steps

Both learn from performances: speech with known phoneme times and a face that goes with it (`spoken`), and where it is
given real speech with the mouth that spoke it (`facegood`). They are made once and kept in ``--data``.
What a step draws depends on ``(seed, step)`` alone. Axes as in `streamdiff.avatar.window`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from streamdiff import rng
from streamdiff.avatar.window import MotionConfig, MotionModel, load_motion, save_motion
from streamdiff.errors import ConfigError, InputError
from streamdiff.options import MINUTES, Number
from streamdiff.output import make_folder
from streamdiff.tensorfile import save_tensors
from streamdiff.training import recipe
from streamdiff.training.avatar.facegood import recorded
from streamdiff.training.avatar.motion_loss import consistency_loss, error_weights, fit_scale, flow_loss
from streamdiff.training.avatar.motion_quality import evaluate
from streamdiff.training.avatar.performance import Performance
from streamdiff.training.avatar.spoken import spoken_minutes
from streamdiff.training.avatar.windows import Dataset
from streamdiff.training.followed import Followed
from streamdiff.training.loop import Part, Trainer

logger = logging.getLogger(__name__)

PERFORMANCES, WEIGHTS = "performances.safetensors", "motion.safetensors"
_FIRST_HELD_OUT = 1_000_000


class FlowTask:
    """Flow matching with windows of performances: what `streamdiff.training.loop` runs, one batch a step."""

    def __init__(self, model: MotionModel, dataset: Dataset, *, batch: int, lr: float, seed: int) -> None:
        self.parts = {"motion": Part(module=model, lr=lr, average=0.999)}
        self._model, self._dataset, self._batch, self._seed = model, dataset, batch, seed
        self._weight_E = error_weights(model.spec)

    def gradients(self, step: int) -> Mapping[str, float]:
        drawn, generator = _drawn(self._dataset, self._batch, self._seed, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = flow_loss(self._model, drawn, self._weight_E, generator)
        loss.backward()
        return {"loss": float(loss.detach())}


class ConsistencyTask:
    """Consistency distillation from a model trained by flow matching, which the student begins as."""

    def __init__(self, model: MotionModel, dataset: Dataset, *, batch: int, lr: float, seed: int) -> None:
        self._teacher = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self.followed = Followed(model, 0.995)
        self.parts = {"motion": Part(module=self.followed, lr=lr, average=0.0)}
        self._dataset, self._batch, self._seed = dataset, batch, seed
        self._weight_E = error_weights(model.spec)

    def gradients(self, step: int) -> Mapping[str, float]:
        self.followed.follow(step)
        drawn, generator = _drawn(self._dataset, self._batch, self._seed, step)
        student, average = self.followed.model, self.followed.average
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = consistency_loss(student, average, self._teacher, drawn, self._weight_E, generator)
        loss.backward()
        return {"loss": float(loss.detach())}


def _drawn(dataset: Dataset, batch: int, seed: int, step: int) -> tuple[dict[str, Tensor], torch.Generator]:
    """The windows of a step, and what its noise is drawn from."""
    generator = torch.Generator().manual_seed(rng.seed_of("motion batch", seed, step))
    return dataset.draw(batch, generator), generator


def random_motion(config: MotionConfig, motion_AE: Tensor, *, seed: int) -> MotionModel:
    """A model to begin with: random weights, and the scale of this motion."""
    torch.manual_seed(seed)
    model = MotionModel(config)
    fit_scale(model, motion_AE)
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train motion``."""
    _add_shared(parser, lr=1.2e-3)


def add_consistency_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train motion-consistency``."""
    _add_shared(parser, lr=3.6e-4)
    parser.add_argument("--init", type=Path, required=True, metavar="FILE", help="weights of recipe motion")


def _add_shared(parser: argparse.ArgumentParser, *, lr: float) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="keeps the performances; made if it has none",
    )
    add("--facegood", type=Path, metavar="FILE",
        help="facegood_audio2rig.npz, real speech to learn from as well (default: synthetic speech only)")  # fmt: skip
    add("--speech-minutes", type=MINUTES, default=180.0, metavar="N",
        help="minutes of speech to synthesise (default: %(default)s)")  # fmt: skip
    add("--held-out-minutes", type=Number(0, 1440), default=3.0, metavar="N",
        help="minutes of other speech to judge by; 0: do not judge (default: %(default)s)")  # fmt: skip
    recipe.add_run_arguments(parser, batch=64, lr=lr, of="windows")


def run(args: argparse.Namespace) -> int:
    """Train the motion model by flow matching."""
    recipe.set_machine(args)
    config = MotionConfig()
    dataset, held_out = _data_of(args, config)
    model = random_motion(config, dataset.motion, seed=args.seed)
    task = FlowTask(model, dataset, batch=args.batch, lr=args.lr, seed=args.seed)

    def finish(trainer: Trainer) -> list[Path]:
        with trainer.averaged("motion"):
            return [_write(model, args, trainer, held_out)]

    plan = recipe.plan_of(args, budget="52min", warmup_steps=200)
    return recipe.conduct("motion", task, args, plan, facts=_facts(args, dataset), finish=finish)


def run_consistency(args: argparse.Namespace) -> int:
    """Distil the motion model to two steps."""
    recipe.set_machine(args)
    model = load_motion(args.init).train().requires_grad_(requires_grad=True)
    dataset, held_out = _data_of(args, model.config)
    task = ConsistencyTask(model, dataset, batch=args.batch, lr=args.lr, seed=args.seed)

    def finish(trainer: Trainer) -> list[Path]:
        task.followed.follow(trainer.step)
        return [_write(task.followed.average, args, trainer, held_out)]

    plan = recipe.plan_of(args, budget="6min", warmup_steps=200)
    facts = {**_facts(args, dataset), "init": args.init}
    return recipe.conduct("motion-consistency", task, args, plan, facts=facts, finish=finish)


def _facts(args: argparse.Namespace, dataset: Dataset) -> dict[str, object]:
    """What a resumed run must agree on."""
    asked = {name: getattr(args, name) for name in ("seed", "batch", "lr")}
    return {**asked, "performances": len(dataset.tensors["lengths"]), "frames": len(dataset.motion)}


def _data_of(args: argparse.Namespace, config: MotionConfig) -> tuple[Dataset, list[Performance]]:
    """What is learned from, made if it is not there yet, and what is judged by."""
    if args.device != "cpu":
        raise ConfigError(f"the motion model trains on a CPU, got --device {args.device}; leave it out")
    if args.speech_minutes <= 0 or args.held_out_minutes < 0:
        raise ConfigError(
            f"--speech-minutes lies above 0 and --held-out-minutes is 0 or more, got {args.speech_minutes} and "
            f"{args.held_out_minutes}"
        )
    real = recorded(args.facegood, seed=args.seed) if args.facegood is not None else []
    # The last take is never trained on.
    last = real[-1].source if real else ""
    path = args.data / PERFORMANCES
    if not path.is_file():
        made = [*spoken_minutes(args.speech_minutes, seed=args.seed), *(p for p in real if p.source != last)]
        _keep(Dataset.pack(made), path)
    try:
        dataset = Dataset(load_file(path), config)
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path} holds no performances ({error}); remove it, and they are made again") from error
    held_out = spoken_minutes(args.held_out_minutes, seed=args.seed + 1, first=_FIRST_HELD_OUT)
    if held_out and real:
        held_out.append(next(p for p in real if p.source == last))
    return dataset, held_out


def _keep(tensors: Mapping[str, Tensor], path: Path) -> None:
    make_folder(path.parent)
    save_tensors(tensors, path)
    logger.info("wrote %s: %d performances", path, len(tensors["lengths"]))


def _write(model: MotionModel, args: argparse.Namespace, trainer: Trainer, held_out: list[Performance]) -> Path:
    """Judge a model, say how good it is, and write it."""
    model.eval()
    quality = evaluate(model, held_out)
    if quality:
        sys.stdout.write(json.dumps(quality, indent=1) + "\n")
    path = args.out / WEIGHTS
    save_motion(model, path, facts={**trainer.facts, "steps": trainer.step, "quality": quality})
    return path
