"""The published LivePortrait files fit our networks tensor by tensor, and what does not fit says where."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from streamdiff.avatar import liveportrait
from streamdiff.avatar.kinematics import arkit64, lp70, lp70_to_lp265, lp265
from streamdiff.avatar.liveportrait import FILES, LivePortraitRenderer
from streamdiff.avatar.liveportrait_networks import NETWORKS
from streamdiff.errors import CheckpointError, ConfigError, InputError
from tests.avatar.drawn_face import drawn_bundle

PUBLISHED = {
    "appearance": (107, "8ffe3a4eb733e654"),
    "motion": (212, "03076bbc0669460d"),
    "warping": (97, "2eb695bedff37e7e"),
    "drawing": (182, "40a0ddc9ae517a5c"),
    "stitching": (8, "53ea55ebd9862783"),
}
"""Number of tensors of the published modules, and the hash of their names and shapes:

    lines = "\\n".join(f"{name} {list(value.shape)}" for name, value in sorted(module.state_dict().items()))
    hashlib.sha256(lines.encode()).hexdigest()[:16]
"""


def published_shapes(role: str) -> dict[str, torch.Size]:
    """What the published module's state dict would hold, told from ours."""
    with torch.device("meta"):
        ours = NETWORKS[role]().state_dict()
    shapes: dict[str, torch.Size] = {}
    for name, value in ours.items():
        spectral = role == "drawing" and name.rsplit(".", 2)[-2] in ("conv_0", "conv_1", "conv_s")
        if spectral and name.endswith(".weight"):
            shapes[f"{name}_orig"] = value.shape
            shapes[f"{name}_u"] = torch.Size([value.shape[0]])
            shapes[f"{name}_v"] = torch.Size([value[0].numel()])
        else:
            shapes[name] = value.shape
    return shapes


@pytest.mark.parametrize("role", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(role: str) -> None:
    shapes = published_shapes(role)
    lines = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    assert (len(shapes), hashlib.sha256(lines.encode()).hexdigest()[:16]) == PUBLISHED[role]


@pytest.mark.heavy
@pytest.mark.parametrize("role", PUBLISHED)
def test_published_tensors_load(role: str) -> None:
    tensors = {f"module.{name}": torch.ones(shape) for name, shape in published_shapes(role).items()}
    network = liveportrait.load_network(role, tensors)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_spectral_norm_becomes_one_weight() -> None:
    torch.manual_seed(0)
    normed = nn.utils.spectral_norm(nn.Conv2d(3, 5, 3)).eval()
    state = {f"conv_0.{name}": value for name, value in normed.state_dict().items()}
    plain = nn.Conv2d(3, 5, 3)
    plain.load_state_dict({k.removeprefix("conv_0."): v for k, v in liveportrait.adapt("drawing", state).items()})
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(plain(x), normed(x))


def test_what_does_not_fit_is_named() -> None:
    tensors = {name: torch.ones(shape) for name, shape in published_shapes("stitching").items()}
    tensors["mlp.0.weight"] = torch.ones(2, 2)
    tensors["extra"] = tensors.pop("mlp.6.bias")
    with pytest.raises(CheckpointError, match=r"mlp\.6\.bias is missing; extra is not known; mlp\.0\.weight has shape"):
        liveportrait.load_network("stitching", tensors)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=FILES["appearance"]):
        liveportrait.load_networks(tmp_path)
    (tmp_path / FILES["appearance"]).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        liveportrait.load_networks(tmp_path)


def test_angles_are_expected_bins() -> None:
    motion = np.zeros((3, 70), np.float32)
    motion[:, lp70().part("angles")] = [[0, 10, -20], [33.3, -45, 1.5], [-90, 90, 0]]
    logits = torch.from_numpy(lp70_to_lp265(motion))
    for axis in ("pitch", "yaw", "roll"):
        column = ("pitch", "yaw", "roll").index(axis)
        read = liveportrait.angle_of(logits[:, lp265().part(axis)])
        assert torch.allclose(read, torch.from_numpy(motion[:, lp70().part("angles")][:, column]), atol=1e-3)


class _Told(nn.Module):
    """Stands for a network: answers with a function of what it was given."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *inputs: torch.Tensor):
        return self.answer(*inputs)


def told_networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    points = torch.randn(1, 63) * 0.1
    read = {"kp": points, "scale": torch.ones(1, 1), "t": torch.zeros(1, 3), "exp": torch.zeros(1, 63)}
    read |= dict.fromkeys(("pitch", "yaw", "roll"), torch.zeros(1, 66))
    return {
        "appearance": _Told(lambda picture: picture.mean((2, 3))),
        "motion": _Told(lambda _: read),
        "warping": _Told(lambda volume, driving, source: driving - source),
        "drawing": _Told(lambda moved: (moved.abs().mean() * torch.ones(1, 3, 512, 512)).clamp(0, 1)),
    }


def test_both_layouts_draw_the_same() -> None:
    motion = np.tile(lp70().rest_E, (4, 1))
    motion[:, lp70().part("angles")] = np.random.default_rng(0).uniform(-20, 20, (4, 3))
    motion[:, lp70().part("expression")] = np.random.default_rng(1).normal(0, 0.02, (4, 63))
    a = LivePortraitRenderer(drawn_bundle(), told_networks()).render(motion)
    b = LivePortraitRenderer(drawn_bundle(), told_networks(), spec=lp265()).render(lp70_to_lp265(motion))
    assert a.shape == (4, 512, 512, 3)
    assert (a.int() - b.int()).abs().max() <= 1
    assert len({int(frame.float().mean() * 100) for frame in a}) == 4


def test_layouts_without_key_points_are_refused() -> None:
    with pytest.raises(ConfigError, match="lp70 or lp265"):
        LivePortraitRenderer(drawn_bundle(), told_networks(), spec=arkit64())
    with pytest.raises(InputError, match=r"\[A, 70\]"):
        LivePortraitRenderer(drawn_bundle(), told_networks()).render(np.zeros((1, 64), np.float32))


@pytest.mark.slow
def test_random_weights_draw_a_frame() -> None:
    """All five networks at their full size, shapes meeting shapes."""
    torch.manual_seed(0)
    networks = {role: NETWORKS[role]().eval().requires_grad_(False) for role in PUBLISHED}
    frames = LivePortraitRenderer(drawn_bundle(), networks).render(lp70().rest_E[None])
    assert frames.shape == (1, 512, 512, 3)
    assert frames.float().std() > 0
