"""Train the motion model: data made and read here, flow matching, then consistency to two steps.

    python -m streamdiff.training.avatar.motion --out motion.safetensors [--data facegood_audio2rig.npz] [--minutes 45]

One thread; a checkpoint every two minutes; started again with the same ``--out`` it goes on. The performances that it
learns from are kept there. Axes as in `streamdiff.avatar.window`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamdiff import rng
from streamdiff.avatar.kinematics import KinematicSpec
from streamdiff.avatar.window import MotionConfig, MotionModel, save_motion
from streamdiff.errors import CheckpointError
from streamdiff.training.avatar.facegood import recorded
from streamdiff.training.avatar.motion_quality import evaluate
from streamdiff.training.avatar.spoken import spoken_minutes
from streamdiff.training.avatar.windows import Dataset

logger = logging.getLogger(__name__)


def _weights(spec: KinematicSpec) -> Tensor:
    weight_E = torch.ones(spec.num_coefs)
    for name in spec.names:
        if name.startswith(("mouth", "jaw")):
            weight_E[spec.index(name)] = 1.5
    weight_E[spec.indices(["jawOpen", "mouthPucker", "mouthFunnel", "mouthPressLeft", "mouthPressRight"])] = 3.0
    weight_E[spec.part("reserved")] = 0.0
    return weight_E / weight_E.mean()


def _steadiness(spec: KinematicSpec) -> Tensor:
    """Weight of errors in the change from frame to frame: what moves slowly must not tremble."""
    steady_E = torch.full((spec.num_coefs,), 2.0)
    for part in ("rotation", "translation", "scale"):
        steady_E[spec.part(part)] = 12.0
    for name in spec.names:
        if name.startswith(("brow", "cheek", "eyeSquint", "eyeWide")):
            steady_E[spec.index(name)] = 4.0
    return steady_E


def fit_scale(model: MotionModel, motion_AE: Tensor) -> None:
    """Set the model's normalisation from data; coefficients that hardly move are not blown up."""
    model.mean_E.copy_(motion_AE.mean(0))
    model.std_E.copy_(motion_AE.std(0).clamp_min(0.01))


def _history(model: MotionModel, motion_BAE: Tensor, generator: torch.Generator) -> Tensor:
    """Clean frames as a stream would remember them: a little wrong, and at a start the face at rest."""
    config = model.config
    size = motion_BAE.shape[0]
    history_BAE = model.normal(motion_BAE[:, : config.history])
    noise = torch.randn(history_BAE.shape, generator=generator)
    steady = torch.randn(size, 1, history_BAE.shape[2], generator=generator)
    amount = torch.rand(size, 1, 1, generator=generator)
    history_BAE = history_BAE + amount * (0.08 * noise + 0.15 * steady)
    rest_E = model.normal(torch.from_numpy(model.spec.rest_E.copy()))
    at_rest = torch.rand(size, 1, 1, generator=generator) < 0.02
    return torch.where(at_rest, rest_E.expand_as(history_BAE), history_BAE)


def flow_loss(model: MotionModel, batch: Mapping[str, Tensor], weight_E: Tensor, generator: torch.Generator) -> Tensor:
    """Velocity matching, written as a weighted error of the data, and the error of its change from frame to frame."""
    config = model.config
    history_BAE = _history(model, batch["motion"], generator)
    data_BAE = model.normal(batch["motion"][:, config.history :])
    size = len(data_BAE)
    # Half the draws near pure noise: with few steps, the first decides most.
    uniform = torch.rand(size, generator=generator)
    sigma_B = torch.where(torch.rand(size, generator=generator) < 0.25, torch.ones(()), flow_shift(uniform))
    noise_BAE = torch.randn(data_BAE.shape, generator=generator)
    sigma = sigma_B[:, None, None]
    noisy_BAE = (1 - sigma) * data_BAE + sigma * noise_BAE
    tokens = model.cue_tokens(batch["cues"], batch["style"])
    guess_BAE = model(torch.cat([history_BAE, noisy_BAE], 1), sigma_B, tokens)[:, config.history :].float()
    error_BAE = guess_BAE - data_BAE
    share = 1.0 / sigma.clamp_min(0.25) ** 2
    change_BAE = F.pad(error_BAE, (0, 0, 1, 0)).diff(dim=1)
    steady_E = _steadiness(model.spec)
    return (weight_E * share * (error_BAE**2)).mean() + (steady_E * weight_E * share * change_BAE**2).mean()


def flow_shift(uniform: Tensor, shift: float = 2.0) -> Tensor:
    """Noise levels pushed towards noise, as `streamdiff.flow.shifted`, for a tensor."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def consistency_loss(
    student: MotionModel,
    average: MotionModel,
    teacher: MotionModel,
    batch: Mapping[str, Tensor],
    weight_E: Tensor,
    generator: torch.Generator,
    *,
    num_levels: int = 16,
) -> Tensor:
    """Agree with oneself one teacher step further down (consistency distillation, Song et al. 2023).

    The averaged student judges the next point of the teacher's own path; at the lowest level the data do.
    """
    config = student.config
    history_BAE = _history(student, batch["motion"], generator)
    data_BAE = student.normal(batch["motion"][:, config.history :])
    size = len(data_BAE)
    level = torch.randint(num_levels, (size,), generator=generator)
    level = torch.where(torch.rand(size, generator=generator) < 0.3, torch.zeros_like(level), level)
    grid = flow_shift(torch.linspace(1.0, 0.0, num_levels + 1))
    sigma_B, next_B = grid[level], grid[level + 1]
    sigma, sigma_next = sigma_B[:, None, None], next_B[:, None, None]
    noise_BAE = torch.randn(data_BAE.shape, generator=generator)
    noisy_BAE = (1 - sigma) * data_BAE + sigma * noise_BAE
    cues, style = batch["cues"], batch["style"]
    with torch.no_grad():
        taught = teacher(torch.cat([history_BAE, noisy_BAE], 1), sigma_B, teacher.cue_tokens(cues, style))
        taught_BAE = taught[:, config.history :].float()
        next_BAE = noisy_BAE + (sigma_next - sigma) * (noisy_BAE - taught_BAE) / sigma
        judged = average(torch.cat([history_BAE, next_BAE], 1), next_B, average.cue_tokens(cues, style))
        target_BAE = torch.where(sigma_next > 0, judged[:, config.history :].float(), data_BAE)
    guess = student(torch.cat([history_BAE, noisy_BAE], 1), sigma_B, student.cue_tokens(cues, style))
    error_BAE = guess[:, config.history :].float() - target_BAE
    share = 1.0 / sigma.clamp_min(0.25)
    steady_E = _steadiness(student.spec)
    change = (steady_E * weight_E * share * F.pad(error_BAE, (0, 0, 1, 0)).diff(dim=1) ** 2).mean()
    return (weight_E * share * error_BAE**2).mean() + change


@dataclass
class Progress:
    """What a checkpoint keeps beside the weights."""

    phase: str = "flow"
    spent_s: float = 0.0
    step: int = 0


def train(
    dataset: Dataset,
    out: Path,
    *,
    config: MotionConfig,
    minutes: float,
    distil_minutes: float,
    batch: int = 64,
    rate: float = 1.2e-3,
    seed: int = 0,
) -> MotionModel:
    """Run both phases for the given minutes of CPU time, going on from the checkpoint beside ``out``."""
    torch.manual_seed(seed)
    model = MotionModel(config)
    fit_scale(model, dataset.motion)
    average = copy.deepcopy(model)
    progress = Progress()
    checkpoint = out.with_suffix(".training.pt")
    generator = torch.Generator().manual_seed(rng.seed_of("batches", seed))
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else None
    teacher: MotionModel | None = None
    if saved is not None:
        progress = Progress(saved["phase"], saved["spent_s"], saved["step"])
        try:
            model.load_state_dict(saved["model"])
            average.load_state_dict(saved["average"])
        except RuntimeError as error:
            raise CheckpointError(f"{checkpoint} is of another model: {error}; remove it to begin anew") from error
        generator.set_state(saved["generator"])
        logger.info("going on from %s, step %d, %.0f s", progress.phase, progress.step, progress.spent_s)
    budgets_s = {"flow": minutes * 60.0, "consistency": distil_minutes * 60.0}
    weight_E = _weights(model.spec)
    for phase in ("flow", "consistency"):
        if phase == "consistency" and progress.phase == "flow":
            progress = Progress("consistency")
            average.load_state_dict(average.state_dict())
            model.load_state_dict(average.state_dict())
            torch.save(average.state_dict(), out.with_suffix(".teacher.pt"))
            saved = None
        if progress.phase != phase:
            continue
        if phase == "consistency":
            teacher = copy.deepcopy(average)
            teacher.load_state_dict(torch.load(out.with_suffix(".teacher.pt"), weights_only=True))
            teacher.eval()
        top = rate if phase == "flow" else rate * 0.3
        optimiser = torch.optim.AdamW(model.parameters(), lr=top, betas=(0.9, 0.98), weight_decay=0.01)
        if saved is not None:
            optimiser.load_state_dict(saved["optimiser"])
        decay = 0.999 if phase == "flow" else 0.995
        clock, last_saved, mean_loss = time.process_time(), time.monotonic(), 0.0
        budget_s = budgets_s[phase]
        while progress.spent_s < budget_s:
            done = progress.spent_s / budget_s
            warm = min(1.0, (progress.step + 1) / 200)
            for group in optimiser.param_groups:
                group["lr"] = top * warm * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
            drawn = dataset.draw(batch, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if teacher is None:
                    loss = flow_loss(model, drawn, weight_E, generator)
                else:
                    loss = consistency_loss(model, average, teacher, drawn, weight_E, generator)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            keep = min(decay, (progress.step + 1) / (progress.step + 10))
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 1 - keep)
            progress.step += 1
            now = time.monotonic()
            spent = time.process_time()
            progress.spent_s += spent - clock
            clock = spent
            mean_loss = loss.item() if mean_loss == 0.0 else 0.98 * mean_loss + 0.02 * loss.item()
            if progress.step % 100 == 0:
                logger.info(
                    "%s step %d  %.0f/%.0f s  loss %.4f",
                    phase,
                    progress.step,
                    progress.spent_s,
                    budget_s,
                    mean_loss,
                )
            if now - last_saved > 120 or progress.spent_s >= budget_s:
                state = {
                    "phase": progress.phase,
                    "spent_s": progress.spent_s,
                    "step": progress.step,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(),
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
                last_saved = now
        saved = None
    return average.eval()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, judge, write weights and say how good they are."""
    parser = argparse.ArgumentParser(prog="streamdiff.training.avatar.motion", description="Train the motion model.")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go; checkpoints lie beside them")
    parser.add_argument("--data", type=Path, help="facegood_audio2rig.npz; without it, synthesised speech only")
    parser.add_argument("--minutes", type=float, default=45.0, help="CPU minutes of flow matching")
    parser.add_argument("--distil-minutes", type=float, default=15.0, help="CPU minutes of consistency distillation")
    parser.add_argument("--speech-minutes", type=float, default=180.0, help="minutes of speech to synthesise")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

    started = time.monotonic()
    kept = args.out.with_suffix(".clips.safetensors")
    held_out = spoken_minutes(3.0, seed=args.seed + 1, first=1_000_000)
    real = recorded(args.data, seed=args.seed) if args.data is not None else []
    if real:
        # The last take is never trained on.
        held_out.append(next(clip for clip in real if clip.source == real[-1].source))
    if kept.is_file():
        packed = load_file(kept)
    else:
        clips = spoken_minutes(args.speech_minutes, seed=args.seed)
        packed = Dataset.pack([*clips, *(clip for clip in real if clip.source != real[-1].source)])
        save_file(packed, kept)
    logger.info("%d clips after %.0f s", len(packed["lengths"]), time.monotonic() - started)
    config = MotionConfig()
    dataset = Dataset(packed, config)
    model = train(
        dataset,
        args.out,
        config=config,
        minutes=args.minutes,
        distil_minutes=args.distil_minutes,
        batch=args.batch,
        seed=args.seed,
    )
    quality = evaluate(model, held_out)
    facts = {"quality": quality, "seed": args.seed, "speech_minutes": args.speech_minutes}
    save_motion(model, args.out, facts=facts)
    logger.info("wrote %s, %d bytes", args.out, args.out.stat().st_size)
    logger.info("%s", json.dumps(quality, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
