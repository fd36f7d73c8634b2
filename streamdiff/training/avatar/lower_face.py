"""Training of a person's lower-face decoder: what the warp of one picture lacks around the mouth.

A frames   C conditions   B frames of a batch   P pixels along a side of the lower face
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.mouth import (
    FACE_EXTENT_CM,
    FACE_LEFT_CM,
    FACE_PATCH,
    FACE_TOP_CM,
    LowerFaceDecoder,
    face_window,
)
from streamdiff.avatar.render import POSE_LIMITS, WarpRenderer, ease_pose
from streamdiff.training.avatar.footage import Footage
from streamdiff.training.loop import Part

_JUDGED_FROM = 300
"""Steps after which the discriminator takes part: before, anything can tell what is drawn."""


def conditions_of(motion_AE: Floats) -> Tensor:
    """What the decoder is told of each frame, ``[A, C]``: shapes, then the rotation that is drawn."""
    spec = arkit64()
    motion = torch.from_numpy(motion_AE.astype(np.float32))
    pose = torch.cat([motion[:, spec.part("rotation")], motion[:, spec.part("translation")]], 1)
    return torch.cat([motion[:, spec.part("face")], ease_pose(pose, torch.tensor(POSE_LIMITS))[:, :3]], 1)


def pairs(
    bundle: IdentityBundle, footage: Footage, motion_AE: Floats, left_top: Floats, factor: float
) -> tuple[Tensor, Tensor]:
    """What the warp makes of every frame's lower face, and what the clip shows there: ``[A, 3, P, P]`` uint8."""
    spec = arkit64()
    renderer = WarpRenderer(bundle)
    unposed_AE = motion_AE.copy()
    for part in ("rotation", "translation", "scale"):
        unposed_AE[:, spec.part(part)] = spec.rest_E[spec.part(part)]
    place = _patch_places(bundle)
    size = bundle.size
    grid = (place * (2 / size) - 1).permute(0, 2, 3, 1)
    warped = torch.empty(len(motion_AE), 3, FACE_PATCH, FACE_PATCH, dtype=torch.uint8)
    wanted = torch.empty_like(warped)
    height, width = footage.frames_AHW3.shape[1:3]
    for n, (coefs_E, still_E) in enumerate(zip(motion_AE, unposed_AE, strict=True)):
        drawn = renderer.render(still_E[None])[0].permute(2, 0, 1)[None].float()
        warped[n] = functional.grid_sample(drawn, grid, align_corners=False, padding_mode="border")[0].round()
        posed = renderer.pose(torch.from_numpy(coefs_E), place)
        x = (posed[:, 0] * factor + float(left_top[0])) * (2 / width) - 1
        y = (posed[:, 1] * factor + float(left_top[1])) * (2 / height) - 1
        frame = torch.from_numpy(footage.frames_AHW3[n]).permute(2, 0, 1)[None].float()
        there = functional.grid_sample(frame, torch.stack([x, y], -1), align_corners=False, padding_mode="border")
        wanted[n] = there[0].round()
    return warped, wanted


def _patch_places(bundle: IdentityBundle) -> Tensor:
    """Where the pixels of the lower face lie in the bundle's picture, ``[1, 2, P, P]``."""
    place = bundle.placement
    axis = (torch.arange(FACE_PATCH) + 0.5) * (FACE_EXTENT_CM / FACE_PATCH)
    v, u = torch.meshgrid(axis + FACE_TOP_CM, axis + FACE_LEFT_CM, indexing="ij")
    cos, sin = float(np.cos(place.roll)), float(np.sin(place.roll))
    x = place.stomion[0] + place.pixels_per_cm * (cos * u - sin * v)
    y = place.stomion[1] + place.pixels_per_cm * (sin * u + cos * v)
    return torch.stack([x, y])[None]


class Judge(nn.Module):
    """Patch discriminator (PatchGAN, Isola et al. 2017; hinge loss): frames of the video against decoded ones."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, width * 2, width * 4)
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(a, b, 4, 2, 1)) for a, b in itertools.pairwise(widths)
        )
        self.verdict = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, picture: Tensor) -> tuple[Tensor, list[Tensor]]:
        features: list[Tensor] = []
        for layer in self.layers:
            picture = functional.leaky_relu(layer(picture), 0.2)
            features.append(picture)
        return self.verdict(picture), features


def _compose(lacking: Tensor, warped: Tensor, window: Tensor) -> Tensor:
    return warped + lacking * window


def _mouth_box() -> Tensor:
    """Where in the lower face the mouth opens and shuts, ``[P, P]``."""
    axis = (torch.arange(FACE_PATCH) + 0.5) * (FACE_EXTENT_CM / FACE_PATCH)
    across, down = (axis + FACE_LEFT_CM).abs() < 3.0, axis + FACE_TOP_CM
    return ((down > -1.2) & (down < 3.5))[:, None] * across[None, :].float()


@torch.inference_mode()
def errors_of(
    decoder: LowerFaceDecoder, conditions: Tensor, warped: Tensor, wanted: Tensor
) -> tuple[float, float, float, float]:
    """Mean absolute errors (of 255) before and after, over the window and around the mouth."""
    window, mouth = face_window(), _mouth_box()
    base, target = warped.float() / 255, wanted.float() / 255
    drawn = torch.cat(
        [_compose(decoder(c), b, window) for c, b in zip(conditions.split(32), base.split(32), strict=True)]
    )

    def error(picture: Tensor, weight: Tensor) -> float:
        return float(((picture - target).abs() * weight).sum() / (weight.sum() * 3 * len(target)) * 255)

    return error(base, window), error(drawn, window), error(base, mouth), error(drawn, mouth)


class LowerFaceTask:
    """What `streamdiff.training.loop` runs: one batch of frames a step.

    Args:
        conditions: ``[A, C]``.
        warped, wanted: what the warp makes of every frame's lower face, and what the video shows there (`pairs`).
        adversarial: adds a patch discriminator and the distance of its features after `_JUDGED_FROM` steps.
    """

    def __init__(
        self,
        conditions: Tensor,
        warped: Tensor,
        wanted: Tensor,
        *,
        batch: int = 16,
        lr: float = 1.5e-3,
        seed: int = 0,
        device: str = "cpu",
        adversarial: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.decoder = LowerFaceDecoder()
        self.decoder.low_C.copy_(conditions.quantile(0.005, dim=0))
        self.decoder.high_C.copy_(conditions.quantile(0.995, dim=0))
        self.decoder.to(device)
        self.parts = {
            "decoder": Part(
                module=self.decoder, lr=lr, betas=(0.9, 0.999), weight_decay=1e-3, average=0.998, final_lr=0.02
            )
        }
        self._judge = Judge().to(device) if adversarial else None
        if self._judge is not None:
            # At a constant rate and without bounds: it chases what the decoder draws now.
            self.parts["judge"] = Part(
                module=self._judge, lr=4e-4, betas=(0.0, 0.99), weight_decay=0.0, clip_norm=math.inf, average=0.0,
                final_lr=1.0,
            )  # fmt: skip
        self._frames = (conditions, warped, wanted)
        self._batch, self._seed, self._device = batch, seed, device
        self._window = face_window().to(device)
        self._emphasis = (0.1 + self._window + 2.0 * _mouth_box().to(device)) * (self._window > 0)

    def gradients(self, step: int) -> Mapping[str, float]:
        conditions, base, target = self._drawn(step)
        drawn = _compose(self.decoder(conditions), base, self._window)
        error, emphasis = drawn - target, self._emphasis
        value = (
            (error.abs() * emphasis).mean()
            + (error.diff(dim=3).abs() * emphasis[:, 1:]).mean()
            + (error.diff(dim=2).abs() * emphasis[1:]).mean()
        )
        numbers = {"loss": float(value.detach())}
        if self._judge is not None and step >= _JUDGED_FROM:
            value = value + _judged(self._judge, drawn, target)
        value.backward(inputs=list(self.decoder.parameters()))
        if self._judge is not None and step >= _JUDGED_FROM:
            real, _ = self._judge(target)
            fake, _ = self._judge(drawn.detach())
            mistaken = functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
            mistaken.backward()
            numbers["judge"] = float(mistaken.detach())
        return numbers

    def _drawn(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Conditions, warped and wanted pictures of a step."""
        generator = torch.Generator().manual_seed(rng.seed_of("lower face batch", self._seed, step))
        conditions, warped, wanted = self._frames
        chosen = torch.randint(len(conditions), (self._batch,), generator=generator)
        # Landmarks jitter; a decoder that may not lean on their last digit draws steadier frames.
        noise = torch.randn(self._batch, conditions.shape[1], generator=generator) * 0.01
        base, target = (x[chosen].to(self._device).float() / 255 for x in (warped, wanted))
        return (conditions[chosen] + noise).to(self._device), base, target


def _judged(judge: Judge, drawn: Tensor, target: Tensor) -> Tensor:
    """What the judge adds to the decoder's loss: the distance of its features, less its verdict."""
    with torch.no_grad():
        _, wanted = judge(target)
    verdict, features = judge(drawn)
    matched = torch.stack([(a - b).abs().mean() for a, b in zip(features, wanted, strict=True)]).sum()
    return 0.02 * matched - 0.005 * verdict.mean()
