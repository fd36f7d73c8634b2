"""The motion model: a flow-matching transformer over one short window of named coefficients.

A window is up to 8 frames that were already shown and 3 to 24 new ones; the model denoises the new ones, given what is
heard (log-mel), what is said (phonemes, when they are known), what is intended (a blink, a look), what the avatar is
doing (idle, listening, speaking) and how it moves (a style).

Flow convention as in `streamdiff.flow`: x = (1 - sigma) * data + sigma * noise; the model predicts the data.

Axes: B windows, A frames, E coefficients, C cues of a frame, D width, N heads, K head width.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff import flow
from streamdiff.avatar import kinematics
from streamdiff.avatar.cues import NUM_CUES, PHONES
from streamdiff.avatar.style import STYLE_NAMES
from streamdiff.errors import CheckpointError, ConfigError, InputError
from streamdiff.facts import Facts, parse_json, printable
from streamdiff.packaged import packaged
from streamdiff.tensorfile import TensorFile, like, save_tensors

_SPECS = {"arkit64": kinematics.arkit64, "full256": kinematics.full256}


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionConfig:
    """Shape of the motion model and of its windows."""

    spec: str = "arkit64"
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    hidden: int = 768
    history: int = 8
    """Frames already shown that a window sees."""
    lengths: tuple[int, ...] = (3, 8, 24)
    """New frames in a window, rising; the shortest fits live sound with 80 ms of look-ahead."""
    sigmas: tuple[float, ...] = (1.0, 0.5, 0.0)

    def __post_init__(self) -> None:
        if self.spec not in _SPECS:
            raise ConfigError(f"no motion layout {self.spec!r}; the model moves {', '.join(_SPECS)}")
        if self.dim % self.num_heads:
            raise ConfigError(f"dim must split into {self.num_heads} heads, got {self.dim}")
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ConfigError(f"lengths must rise from 1 on, got {self.lengths}")
        if len(self.sigmas) < 2 or list(self.sigmas) != sorted(set(self.sigmas), reverse=True):
            raise ConfigError(f"sigmas must fall from noise to data, got {self.sigmas}; try (1.0, 0.5, 0.0)")
        if self.sigmas[0] != 1.0 or self.sigmas[-1] != 0.0:
            raise ConfigError(f"sigmas must start at 1 and end at 0, got {self.sigmas}")

    @property
    def window(self) -> int:
        """Frames in the longest window."""
        return self.history + self.lengths[-1]


class _Layer(nn.Module):
    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.shift = nn.Parameter(torch.zeros(6, dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, config.hidden)
        self.down = nn.Linear(config.hidden, dim)

    def forward(self, x_BAD: Tensor, modulation_B6D: Tensor) -> Tensor:
        B, A, D = x_BAD.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation_B6D + self.shift)[:, :, None].unbind(1)
        h_BAD = F.layer_norm(x_BAD, (D,)) * (1 + scale_1) + shift_1
        q_BNAK, k_BNAK, v_BNAK = self.qkv(h_BAD).view(B, A, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended_BNAK = F.scaled_dot_product_attention(q_BNAK, k_BNAK, v_BNAK)
        x_BAD = x_BAD + gate_1 * self.out(attended_BNAK.transpose(1, 2).reshape(B, A, D))
        h_BAD = F.layer_norm(x_BAD, (D,)) * (1 + scale_2) + shift_2
        return x_BAD + gate_2 * self.down(F.gelu(self.up(h_BAD), approximate="tanh"))


class MotionModel(nn.Module):
    """Predicts the data of a window from its noisy frames: adaptive-norm transformer, one token per frame.

    Coefficients inside are normalised: ``(motion - mean) / std`` per coefficient.
    """

    mean_E: Tensor
    std_E: Tensor

    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        self.config = config
        self.spec = _SPECS[config.spec]()
        num_coefs, dim = self.spec.num_coefs, config.dim
        self.enter = nn.Linear(num_coefs + 1, dim)
        self.cue = nn.Sequential(nn.Linear(NUM_CUES, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        place_AD = torch.empty(config.window, dim)
        if not place_AD.is_meta:
            # Drawing on no device would import the compiler: a second of every start.
            place_AD.normal_().mul_(0.02)
        self.place = nn.Parameter(place_AD)
        self.level = nn.Sequential(nn.Linear(64, dim), nn.SiLU())
        self.style = nn.Linear(len(STYLE_NAMES), dim, bias=False)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.leave = nn.Linear(dim, num_coefs)
        self.register_buffer("mean_E", torch.zeros(num_coefs))
        self.register_buffer("std_E", torch.ones(num_coefs))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            with torch.no_grad():
                layer.shift[2].fill_(0.5)
                layer.shift[5].fill_(0.5)

    def cue_tokens(self, cues_BAC: Tensor, style_BS: Tensor) -> tuple[Tensor, Tensor]:
        """What does not change from step to step: cue tokens ``[B, A, D]`` and the style ``[B, D]``."""
        return self.cue(cues_BAC) + self.place[: cues_BAC.shape[1]], self.style(style_BS)

    def forward(self, x_BAE: Tensor, sigma_B: Tensor, tokens: tuple[Tensor, Tensor]) -> Tensor:
        """Data ``[B, A, E]`` from history (clean) and new frames (noisy at ``sigma_B``), both normalised."""
        cues_BAD, style_BD = tokens
        is_new_A = torch.arange(x_BAE.shape[1], device=x_BAE.device) >= self.config.history
        flag_BA1 = is_new_A.to(x_BAE.dtype)[None, :, None].expand(x_BAE.shape[0], -1, 1)
        x_BAD = self.enter(torch.cat([x_BAE, flag_BA1], -1)) + cues_BAD
        condition_BD = F.silu(self.level(_waves(sigma_B)) + style_BD)
        modulation_B6D = self.modulation(condition_BD).view(x_BAE.shape[0], 6, -1)
        for layer in self.layers:
            x_BAD = layer(x_BAD, modulation_B6D)
        return self.leave(F.layer_norm(x_BAD, (x_BAD.shape[-1],)))

    def normal(self, motion: Tensor) -> Tensor:
        """Normalised coefficients."""
        return (motion - self.mean_E) / self.std_E

    def motion(self, normal: Tensor) -> Tensor:
        """Coefficients in their own units."""
        return normal * self.std_E + self.mean_E

    def denoise(
        self,
        noise_BAE: Tensor,
        history_BAE: Tensor,
        cues_BAC: Tensor,
        style_BS: Tensor,
        sigmas: Sequence[float] | None = None,
    ) -> Tensor:
        """New frames from noise: an Euler walk down ``sigmas`` (normalised in and out).

        The walk follows the velocity ``(x - data) / sigma``, so the last step lands on the model's own
        answer.
        """
        grid = sigmas or self.config.sigmas
        tokens = self.cue_tokens(cues_BAC, style_BS)
        x_BAE = noise_BAE
        for sigma, sigma_next in itertools.pairwise(grid):
            level_B = torch.full((len(x_BAE),), sigma, device=x_BAE.device)
            whole_BAE = torch.cat([history_BAE, x_BAE], 1)
            data_BAE = self(whole_BAE, level_B, tokens)[:, history_BAE.shape[1] :]
            velocity_BAE = (x_BAE - data_BAE) / sigma
            x_BAE = flow.euler_step(x_BAE, velocity_BAE, sigma=sigma, sigma_next=sigma_next)
        return x_BAE


def _waves(sigma_B: Tensor) -> Tensor:
    angles = sigma_B[:, None] * torch.exp(torch.linspace(0.0, 6.0, 32, device=sigma_B.device))[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


_FORMAT = "streamdiff.motion.1"


def save_motion(model: MotionModel, path: str | Path, *, facts: Mapping[str, Any] | None = None) -> None:
    """Write a model as fp16 safetensors with its shape, and any facts worth keeping, in the metadata."""
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    # Means and deviations set the scale of everything: not a place to round.
    tensors |= {name: getattr(model, name).detach().cpu().float().contiguous() for name in ("mean_E", "std_E")}
    metadata = {"format": _FORMAT, "config": json.dumps(asdict(model.config)), "phones": json.dumps(PHONES)}
    metadata["facts"] = json.dumps(facts or {}, sort_keys=True)
    save_tensors(tensors, path, metadata)


def load_motion(path: str | Path | None = None, *, device: str | torch.device = "cpu") -> MotionModel:
    """The motion model from a file; None: the one that ships with the package.

    Raises:
        InputError: no such file.
        CheckpointError: a file of something else, or of another shape.
    """
    path = Path(path) if path is not None else weights_path()
    if not path.is_file():
        raise InputError(f"no motion weights at {path}; check the path, or train them: streamdiff train motion --help")
    hint = "train them: streamdiff train motion --help"
    file = TensorFile(path, what="a motion model", hint=hint, most_bytes=_MAX_BYTES)
    if file.metadata.get("format") != _FORMAT:
        found = printable(file.metadata.get("format"))
        raise CheckpointError(f"{path} holds no motion model: its format is {found!r}, not {_FORMAT!r}; {hint}")
    config = _read_config(file)
    # On no device: what a config claims costs nothing before the file has shown that it holds as much.
    with torch.device("meta"):
        model = MotionModel(config)
    wanted = like(model.state_dict())
    wanted |= {"mean_E": replace(wanted["mean_E"], low=-1e3, high=1e3)}
    wanted |= {"std_E": replace(wanted["std_E"], low=1e-6, high=1e3)}
    tensors = file.tensors(wanted)
    file.check_values(tensors, wanted)
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return model.to(device).eval().requires_grad_(requires_grad=False)


_MAX_BYTES = 1 << 30


def _read_config(file: TensorFile) -> MotionConfig:
    """The model's shape from a file's metadata; every number is bounded before a model is made from it."""
    try:
        config = Facts(parse_json(file.metadata.get("config", "")), file.fail, "config.")
        phones = parse_json(file.metadata.get("phones", ""))
    except ValueError as error:
        file.fail(f"its config is no JSON ({error})")
    if phones != list(PHONES):
        file.fail("it was trained on another list of phonemes")
    config.only([f.name for f in fields(MotionConfig)])
    lengths = config.numbers("lengths", 1, 256)
    if not all(isinstance(n, int) for n in lengths):
        file.fail("config.lengths must be whole numbers")
    try:
        return MotionConfig(
            spec=config.words("spec"),
            dim=config.whole("dim", 1, 8192),
            num_layers=config.whole("num_layers", 1, 128),
            num_heads=config.whole("num_heads", 1, 256),
            hidden=config.whole("hidden", 1, 65536),
            history=config.whole("history", 1, 256),
            lengths=tuple(int(n) for n in lengths),
            sigmas=config.numbers("sigmas", 0, 1),
        )
    except ConfigError as error:
        file.fail(str(error))


def weights_path() -> Path:
    """Where the packaged weights lie. Raises CheckpointError when they were altered."""
    return packaged("motion_arkit64.safetensors")
