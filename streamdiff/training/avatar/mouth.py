"""The mouth decoder: ``streamdiff train mouth`` teaches it what a 3D head's mouth looks like inside.

    streamdiff train mouth --head ict_facekit.npz --data run/mouths --out run/mouth --budget 40min

One CPU thread draws 16,000 pictures in about ten minutes (`mouth_pictures`); they are drawn once and kept.
What a step draws depends on ``(seed, step)`` alone.

    N pictures   C conditions   P pixels along a side
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from streamdiff import rng
from streamdiff.avatar.head3d import HeadModel
from streamdiff.avatar.mouth import NUM_CONDITIONS, PATCH, MouthDecoder
from streamdiff.errors import ConfigError, InputError
from streamdiff.options import Whole
from streamdiff.output import make_folder
from streamdiff.tensorfile import save_tensors
from streamdiff.training import recipe
from streamdiff.training.avatar.mouth_pictures import MouthPainter
from streamdiff.training.loop import Part, Trainer

logger = logging.getLogger(__name__)

PICTURES, WEIGHTS = "mouths.safetensors", "mouth_decoder.safetensors"


def draw(head: HeadModel, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Conditions ``[N, C]``, pictures ``[N, 4, P, P]`` (uint8) and pixel weights ``[N, P, P]`` (float16)."""
    painter = MouthPainter(head)
    conditions = torch.empty(count, NUM_CONDITIONS)
    pictures = torch.empty(count, 4, PATCH, PATCH, dtype=torch.uint8)
    weights = torch.empty(count, PATCH, PATCH, dtype=torch.float16)
    for n in range(count):
        # One generator per picture: picture n is the same in a set of any size.
        scene = painter.scene(np.random.default_rng([seed, n]))
        conditions[n] = torch.from_numpy(scene.conditions_C)
        pictures[n] = torch.from_numpy(painter.picture(scene)).permute(2, 0, 1)
        weights[n] = torch.from_numpy(painter.weights(scene))
        if n % 1000 == 999:
            logger.info("drew %d pictures of %d", n + 1, count)
    return conditions, pictures, weights


def loss(drawn: Tensor, target: Tensor, weights_NPP: Tensor) -> Tensor:
    """Weighted L1 of channels and of their differences to the right and below: edges stay edges.

    Squares are added for the last channel: rarely anything but zero, under L1 alone it would stay there.
    """
    weights = weights_NPP[:, None]
    error = drawn - target
    across, down = error.diff(dim=3), error.diff(dim=2)
    return (
        (error.abs() * weights).mean()
        + (across.abs() * weights[..., 1:]).mean()
        + (down.abs() * weights[..., 1:, :]).mean()
        + 4 * error[:, 3].square().mean()
    )


class MouthTask:
    """What `streamdiff.training.loop` runs: one batch of pictures a step.

    Args:
        pictures: ``conditions`` [N, C], ``pictures`` [N, 4, P, P] uint8 and ``weights`` [N, P, P], as `draw` makes
            them; the first 32nd is held out.
    """

    def __init__(
        self, model: MouthDecoder, pictures: Mapping[str, Tensor], *, batch: int, lr: float, seed: int,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.parts = {
            "mouth": Part(module=model, lr=lr, betas=(0.9, 0.999), weight_decay=1e-4, average=0.999, final_lr=0.02)
        }
        self._model, self._pictures = model, pictures
        self._batch, self._seed, self._device = batch, seed, device
        self.num_held_out = max(len(pictures["conditions"]) // 32, 1)

    def gradients(self, step: int) -> Mapping[str, float]:
        generator = torch.Generator().manual_seed(rng.seed_of("mouth batch", self._seed, step))
        chosen = torch.randint(
            self.num_held_out, len(self._pictures["conditions"]), (self._batch,), generator=generator
        )
        conditions, target, weights = (self._pictures[name][chosen].to(self._device)
                                       for name in ("conditions", "pictures", "weights"))  # fmt: skip
        value = loss(self._model(conditions), target.float() / 255, weights.float())
        value.backward()
        return {"loss": float(value.detach())}

    @torch.inference_mode()
    def held_out_errors(self) -> dict[str, float]:
        """Mean absolute errors of channels (0..1): everywhere, and where the opening may show it."""
        held = self.num_held_out
        conditions = self._pictures["conditions"][:held].to(self._device)
        drawn = torch.cat([self._model(part) for part in conditions.split(64)]).cpu()
        error = (drawn - self._pictures["pictures"][:held].float() / 255).abs()
        weights = self._pictures["weights"][:held, None].float()
        seen = float((error * weights).sum() / (weights.sum() * 4))
        return {"held_out": float(held), "l1": float(error.mean()), "l1_seen": seen}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``streamdiff train mouth``."""
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="keeps the pictures; drawn if it has none")
    add("--head", type=Path, metavar="FILE", help="ict_facekit.npz, the 3D head to draw")
    add(
        "--pictures",
        type=Whole(2, 1_000_000),
        default=16_000,
        metavar="N",
        help="how many to draw (default: %(default)s)",
    )
    recipe.add_run_arguments(parser, batch=24, lr=2e-3, of="pictures")


def run(args: argparse.Namespace) -> int:
    """Train the mouth decoder."""
    recipe.set_machine(args)
    pictures = _pictures_of(args)
    torch.manual_seed(args.seed)
    model = MouthDecoder().to(args.device)
    task = MouthTask(model, pictures, batch=args.batch, lr=args.lr, seed=args.seed, device=args.device)

    def finish(trainer: Trainer) -> list[Path]:
        path = args.out / WEIGHTS
        recipe.save_average(trainer, "mouth", path, dtype=torch.float16)
        with trainer.averaged("mouth"):
            sys.stdout.write(json.dumps(task.held_out_errors()) + "\n")
        return [path]

    asked = {name: getattr(args, name) for name in ("seed", "batch", "lr")}
    facts = {**asked, "pictures": len(pictures["conditions"])}
    plan = recipe.plan_of(args, budget="45min", warmup_steps=200)
    return recipe.conduct("mouth", task, args, plan, facts=facts, finish=finish)


def _pictures_of(args: argparse.Namespace) -> dict[str, Tensor]:
    """The pictures in ``--data``, drawn first if there are none."""
    path = args.data / PICTURES
    if not path.is_file():
        if args.head is None or args.pictures < 2:
            raise ConfigError(
                f"there are no pictures in {args.data}; give --head ict_facekit.npz and --pictures 2 or more"
            )
        names = ("conditions", "pictures", "weights")
        drawn: dict[str, Tensor] = dict(
            zip(names, draw(HeadModel.load(args.head).whole(), args.pictures, args.seed), strict=True)
        )
        make_folder(path.parent)
        save_tensors(drawn, path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} holds no pictures ({error}); remove it, and they are drawn again") from error
