"""How a denoising step is computed: implementation, attention backend, precision, graphs.

Values only, checked when made: importing this module loads neither torch nor a kernel, so that a command line can offer
every choice before it knows whether it will compute anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from streamdiff.config import DiTConfig
from streamdiff.errors import BackendError, ConfigError

if TYPE_CHECKING:
    import torch

    from streamdiff_kernels import Impl


class Precision(StrEnum):
    """Arithmetic of the large linear layers."""

    WEIGHTS = "weights"
    """That of the weights as loaded."""
    FP8 = "fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How a step is computed. The defaults give the same bits on every rank and in every run."""

    impl: Impl | None = None
    """None: Triton on CUDA, plain torch elsewhere."""
    attention: str | None = None
    """A backend of `streamdiff_kernels`, or ``auto`` to measure once and take the fastest (then ranks may differ).
    None: oneDNN on a CPU that has it (heads narrower than 64 excepted, in float32), cuDNN from Hopper on, what torch
    chooses elsewhere."""
    precision: Precision = Precision.WEIGHTS
    kept_layers: int = 1
    """With fp8: how many layers at each end of the model keep the precision of their weights."""
    history: Precision = Precision.WEIGHTS
    """Of the keys and values that are remembered; fp8 takes half the memory, and on CUDA the attention ``triton``."""
    folded_keys: int = 64
    """Prompts of fewer rows are folded (`models/served/cross.py`), and so is sound; 0: nothing is. Up to about 128
    rows save time in bfloat16, up to 71 in fp8; every 64 take 1 GiB at 14B. Heads narrower than 64 are never folded."""
    graph: bool = True
    """Replay CUDA graphs; no effect on a CPU."""
    compile: bool = False
    """Let ``torch.compile`` fuse the block instead of our kernels: one compilation for all layers, steps and chunks, or
    two where attention wants the fill level as an integer. May be combined with ``graph``."""

    def __post_init__(self) -> None:
        if self.folded_keys < 0:
            raise ConfigError(f"folded_keys counts rows of a prompt, got {self.folded_keys}; use 0 for none")
        if self.kept_layers < 0:
            raise ConfigError(f"kept_layers counts layers at each end, got {self.kept_layers}; use 0 for none")

    def resolved(self, device: torch.device) -> Impl:
        """Who computes our ops on this device."""
        from streamdiff_kernels import Impl

        if self.impl is not None:
            return self.impl
        return Impl.TRITON if device.type == "cuda" else Impl.TORCH

    def resolved_attention(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """The backend to ask for; not yet whether it can run."""
        import torch

        from streamdiff_kernels import available_backends

        if device.type == "cuda" and self.history is Precision.FP8 and self.attention in (None, "auto"):
            return "triton"  # the others would widen the whole history at every call
        if self.attention is not None:
            return self.attention
        ready = available_backends(device=device, dtype=dtype, head_dim=head_dim)
        narrow = head_dim < 64 and dtype == torch.float32
        if device.type == "cpu" and ready["onednn"] is None and not narrow:
            return "onednn"  # narrow heads are left to torch: a chunk of the portrait preset takes 0.8 of the time
        if device.type == "cuda" and ready["sdpa-cudnn"] is None and torch.cuda.get_device_capability(device) >= (9, 0):
            return "sdpa-cudnn"
        return "sdpa"

    def check(self, config: DiTConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Find what cannot run here before weights are loaded.

        Raises BackendError for an implementation, an attention backend or a precision that this device, these weights
        or this model rule out. ``auto`` finds a backend everywhere.
        """
        from streamdiff_kernels import BackendUnavailable, require
        from streamdiff_kernels.backends import backend_named

        try:
            require(self.resolved(device), device)
            if self.attention is not None and self.attention != "auto":
                backend_named(self.attention, device=device, dtype=dtype, head_dim=config.head_dim)
        except BackendUnavailable as error:
            raise BackendError(str(error)) from error
        if self.precision is Precision.FP8:
            _check_eight_bits(config, device, dtype)
        if self.history is Precision.FP8 and device.type == "cuda" and self.attention not in (None, "auto", "triton"):
            raise BackendError(
                f"attention {self.attention!r} would widen the whole eight-bit history at every call, which takes "
                "longer than attention itself; leave attention to the options, or name 'triton'"
            )


def _check_eight_bits(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> None:
    import torch

    if dtype != torch.bfloat16:
        raise BackendError(
            f"fp8 linears accumulate to bfloat16 but the weights are {str(dtype).removeprefix('torch.')}; load them as "
            "bfloat16, as is done on CUDA, or use the precision of the weights"
        )
    if config.dim % 16 or config.ffn_dim % 16:
        raise BackendError(
            f"fp8 products want widths in multiples of 16, got dim={config.dim} and ffn_dim={config.ffn_dim}; "
            "use the precision of the weights"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise BackendError(
            f"fp8 products need capability 8.9 (Ada, Hopper) and this GPU has {major}.{minor}; "
            "use the precision of the weights"
        )
