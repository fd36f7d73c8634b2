"""LivePortrait as a renderer, for users who bring its weights.

The published ``.pth`` files load as they are (`streamdiff.avatar.liveportrait_networks`). F and M run once per person.
Motion comes in the layouts of systems that drive it: `kinematics.lp70` (JoyVASA) or `kinematics.lp265` (Ditto),
absolute.

Made for a GPU: 8 s a frame on one CPU thread.

    A frames   N key points (21)   C channels   D, H, W of a volume
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.kinematics import KinematicSpec, lp70
from streamdiff.avatar.liveportrait_networks import NETWORKS, NUM_BINS, NUM_POINTS
from streamdiff.avatar.render import as_motion
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.facts import printable
from streamdiff.tensorfile import FLOATS, like, listed, load_pickled, misfits, plain_fault

FILES = {
    "appearance": "appearance_feature_extractor.pth",
    "motion": "motion_extractor.pth",
    "warping": "warping_module.pth",
    "drawing": "spade_generator.pth",
    "stitching": "stitching_retargeting_module.pth",
}


_MAX_BYTES = 1 << 30
_COUNTER = "num_batches_tracked"


def adapt(role: str, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the published files hold them, as our modules name them.

    The drawing network is published with spectral norm in its parts (weight, u, v): here they are one weight.
    Prefixes of distributed training fall away; batch counters are not used.
    """
    named = {name.removeprefix("module."): value for name, value in published.items()}
    out: dict[str, Tensor] = {}
    for name, value in named.items():
        if name.endswith(_COUNTER):
            out[name] = value
        elif name.endswith(".weight_orig"):
            stem = name.removesuffix("_orig")
            u, v = named.get(f"{stem}_u"), named.get(f"{stem}_v")
            if u is None or v is None:
                raise CheckpointError(f"{role}: {printable(name)} comes without its spectral vectors {stem}_u and _v")
            if value.ndim < 2 or u.shape != value.shape[:1] or v.shape != value.flatten(1).shape[1:]:
                raise CheckpointError(f"{role}: the spectral vectors of {printable(name)} do not fit its shape")
            if not value.is_floating_point() or not u.dtype == v.dtype == value.dtype:
                raise CheckpointError(f"{role}: {printable(name)} and its spectral vectors are not of one kind")
            out[stem] = value / torch.dot(u, value.flatten(1) @ v)
        elif not name.endswith((".weight_u", ".weight_v")):
            out[name] = value
    return out


def load_network(role: str, published: Mapping[str, Tensor]) -> nn.Module:
    """One of `NETWORKS` with published weights; `CheckpointError` names every tensor that does not fit."""
    with torch.device("meta"):
        network = NETWORKS[role]()
    strange = [f"{printable(name)} {why}" for name, value in published.items() if (why := plain_fault(value))]
    tensors = {} if strange else adapt(role, published)
    wanted = like(network.state_dict())
    # Counters of batches are not used; distributed training leaves some as floats.
    counters = {n: replace(w, kinds=(*w.kinds, *FLOATS)) for n, w in wanted.items() if n.endswith(_COUNTER)}
    wrong = strange or misfits(tensors, wanted | counters)
    if wrong:
        raise CheckpointError(f"these are no weights of LivePortrait's {role} network: {listed(wrong)}")
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


def load_networks(folder: str | Path) -> dict[str, nn.Module]:
    """All networks from a folder with the published files; stitching may be left out."""
    networks: dict[str, nn.Module] = {}
    for role, name in FILES.items():
        path = Path(folder) / name
        if not path.exists():
            if role == "stitching":
                continue
            raise InputError(f"{path} is missing; LivePortrait's weights are {', '.join(FILES.values())}")
        hint = "take the file that LivePortrait publishes"
        tensors = load_pickled(path, what="weights", hint=hint, most_bytes=_MAX_BYTES)
        if role == "stitching":
            tensors = tensors.get("retarget_shoulder")
            if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
                raise CheckpointError(f"{path} holds no retarget_shoulder; {hint}")
        networks[role] = load_network(role, tensors)
    return networks


def angle_of(logits_AB: Tensor) -> Tensor:
    """Degrees that 66 logits mean: their expected bin of three degrees, the first at -97.5."""
    bins = torch.arange(NUM_BINS, device=logits_AB.device, dtype=logits_AB.dtype)
    return (logits_AB.softmax(-1) * bins).sum(-1) * 3 - 97.5


def _turn(pitch_A: Tensor, yaw_A: Tensor, roll_A: Tensor) -> Tensor:
    """Rotation ``[A, 3, 3]`` for row vectors: about x, then y, then z, degrees."""
    x, y, z = (angle * (math.pi / 180) for angle in (pitch_A, yaw_A, roll_A))
    one, zero = torch.ones_like(x), torch.zeros_like(x)

    def matrix(*rows: Tensor) -> Tensor:
        return torch.stack(rows, -1).view(-1, 3, 3)

    about_x = matrix(one, zero, zero, zero, x.cos(), -x.sin(), zero, x.sin(), x.cos())
    about_y = matrix(y.cos(), zero, y.sin(), zero, one, zero, -y.sin(), zero, y.cos())
    about_z = matrix(z.cos(), -z.sin(), zero, z.sin(), z.cos(), zero, zero, zero, one)
    return (about_z @ about_y @ about_x).transpose(1, 2)


class LivePortraitRenderer:
    """Draws a bundle's person by LivePortrait's networks, 512 x 512; with the calls of `render.WarpRenderer`.

    ``networks``: `load_networks` of the published files. ``spec``: `kinematics.lp70` or `kinematics.lp265`; other
    layouts say nothing of implicit key points and are refused.
    """

    def __init__(
        self,
        bundle: IdentityBundle,
        networks: Mapping[str, nn.Module],
        *,
        spec: KinematicSpec | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec or lp70()
        if self.spec.name not in ("lp70", "lp265"):
            raise ConfigError(f"LivePortrait is driven by lp70 or lp265, not by {self.spec.name!r}")
        self.device = torch.device(device)
        parts = {role: network.to(self.device) for role, network in networks.items()}
        self._warping, self._drawing = parts["warping"], parts["drawing"]
        self._stitching = parts.get("stitching")
        picture = bundle.reference_3HW[None].float().to(self.device) / 255
        picture = functional.interpolate(picture, size=(256, 256), mode="area")
        with torch.inference_mode():
            self._volume = parts["appearance"](picture)
            read: dict[str, Tensor] = parts["motion"](picture)
        self._points_N3 = read["kp"].view(NUM_POINTS, 3)
        turn = _turn(*(angle_of(read[axis]) for axis in ("pitch", "yaw", "roll")))
        self._source_1N3 = self._place(turn, read["exp"], read["scale"], read["t"])

    @property
    def size(self) -> int:
        """Side of a frame, pixels."""
        return 512

    def _place(self, turn_A33: Tensor, expression: Tensor, scale_A1: Tensor, shift_A3: Tensor) -> Tensor:
        """Key points ``[A, N, 3]``: ``scale (points R + expression) + shift`` (the paper's equation 2)."""
        placed = scale_A1[..., None] * (self._points_N3 @ turn_A33 + expression.view(-1, NUM_POINTS, 3))
        return placed + functional.pad(shift_A3[:, None, :2], (0, 1))

    @torch.inference_mode()
    def render(self, motion_AE: Tensor | NDArray[np.float32]) -> Tensor:
        """Frames ``[A, 512, 512, 3]``, uint8 sRGB, on the renderer's device."""
        motion = as_motion(motion_AE, self.spec).to(self.device)
        frames = torch.empty(len(motion), 512, 512, 3, dtype=torch.uint8, device=self.device)
        part = self.spec.part
        for frame, coefs in zip(frames, motion.split(1), strict=True):
            if self.spec.name == "lp265":
                angles = [angle_of(coefs[:, part(axis)]) for axis in ("pitch", "yaw", "roll")]
            else:
                angles = list(coefs[:, part("angles")].unbind(1))
            driving = self._place(
                _turn(*angles), coefs[:, part("expression")], coefs[:, part("scale")], coefs[:, part("translation")]
            )
            if self._stitching is not None:
                driving = self._stitching(self._source_1N3, driving)
            drawn = self._drawing(self._warping(self._volume, driving, self._source_1N3))
            frame.copy_((drawn[0].permute(1, 2, 0) * 255).round().to(torch.uint8))
        return frames
