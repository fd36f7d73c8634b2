"""What this machine can do for streamdiff, and why not more."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata

import torch


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "--"
    """Absent or slower than it could be; everything still works."""
    WARNING = "!!"
    """Works, but not as it should."""
    ERROR = "XX"
    """Will fail or compute wrong results; must be mended."""


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    subject: str
    text: str


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, for comparing.

    >>> _numbers("2.13.0+cpu")
    (2, 13, 0)
    """
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def examine() -> list[Finding]:
    """Look at everything that matters, worst first within each subject."""
    return [*_host(), *_torch(), *_cuda(), *_nccl(), *_triton(), *_attention(), *_encoders(), *_demo()]


def _host() -> Iterator[Finding]:
    yield Finding(Verdict.OK, "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    free = shutil.disk_usage(".").free / 2**30
    yield Finding(
        Verdict.OK if free > 5 else Verdict.WARNING,
        "disk",
        f"{free:.0f} GiB free here; the 14B checkpoint needs 47",
    )


def _torch() -> Iterator[Finding]:
    yield Finding(Verdict.OK, "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _cuda() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        why = (
            "this torch was built without CUDA; install the CUDA build to use a GPU"
            if torch.version.cuda is None
            else "torch has CUDA but sees no device; check the driver with nvidia-smi"
        )
        yield Finding(Verdict.NOTE, "gpu", f"none: {why}. The portrait preset and the tests run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        size = card.total_memory / 2**30
        fits = (
            "holds a rank of live_avatar_14b"
            if size >= 70
            else "too small for a bfloat16 rank of live_avatar_14b (about 48 GiB)"
        )
        verdict = Verdict.OK if size >= 48 else Verdict.NOTE
        yield Finding(
            verdict, f"gpu {index}", f"{card.name}, {size:.0f} GiB, compute {card.major}.{card.minor}; {fits}"
        )
    count = torch.cuda.device_count()
    if count > 1:
        blind = [
            (a, b) for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)
        ]
        yield Finding(
            Verdict.NOTE if blind else Verdict.OK,
            "peers",
            f"{len(blind)} of {count * (count - 1)} pairs cannot reach each other directly"
            if blind
            else "all GPUs reach each other",
        )


def _nccl() -> Iterator[Finding]:
    found = {name: version for name in ("nvidia-nccl-cu12", "nvidia-nccl-cu13") if (version := _version(name))}
    cuda = torch.version.cuda
    if len(found) == 2:
        yield Finding(
            Verdict.ERROR,
            "nccl",
            "nvidia-nccl-cu12 and -cu13 are both installed and own the same file; uninstall both, then reinstall torch",
        )
    elif "nvidia-nccl-cu12" in found and cuda is not None and cuda.startswith("13"):
        yield Finding(
            Verdict.ERROR,
            "nccl",
            f"nvidia-nccl-cu12 beside a CUDA {cuda} torch; uninstall it, then reinstall torch",
        )
    elif cuda is None:
        yield Finding(Verdict.NOTE, "nccl", "not needed: this torch has no CUDA; ranks talk over gloo")
    else:
        name, version = next(iter(found.items()), ("bundled with torch", ""))
        yield Finding(Verdict.OK, "nccl", f"{name} {version}".strip())


_TRITON_OF_TORCH: dict[tuple[int, ...], str] = {
    (2, 8): "3.4",
    (2, 9): "3.5",
    (2, 10): "3.6",
    (2, 11): "3.6",
    (2, 12): "3.7",
    (2, 13): "3.7",
    (2, 14): "3.8",
    (2, 15): "3.9",
}


def _triton() -> Iterator[Finding]:
    version = _version("triton")
    if version is None:
        yield Finding(
            Verdict.NOTE,
            "triton",
            "not installed; fused kernels run as plain torch (pip install 'streamdiff[triton]')",
        )
        return
    wanted = _TRITON_OF_TORCH.get(_numbers(torch.__version__)[:2])
    if wanted is not None and not version.startswith(wanted) and torch.version.cuda is not None:
        yield Finding(
            Verdict.WARNING,
            "triton",
            f"{version}, but torch {torch.__version__} was made for {wanted}.x; reinstall torch",
        )
        return
    yield Finding(Verdict.OK, "triton", version)
    numpy = _version("numpy")
    if _numbers(version) < (3, 7) and numpy is not None and _numbers(numpy) >= (2, 4):
        yield Finding(
            Verdict.WARNING,
            "triton",
            f"the interpreter of triton {version} fails with numpy {numpy}; use numpy<2.4 or triton>=3.7 for its tests",
        )


def _attention() -> Iterator[Finding]:
    yield Finding(Verdict.OK, "attention", "sdpa (torch)")
    for package, module, what in (
        ("flash-attn", "flash_attn", "FlashAttention 2"),
        ("fa3-fwd", "fa3_fwd_interface", "FlashAttention 3"),
        ("xformers", "xformers", "xformers"),
    ):
        version = _version(package)
        if version is None:
            continue
        usable = torch.cuda.is_available() and importlib.util.find_spec(module) is not None
        yield Finding(
            Verdict.OK if usable else Verdict.NOTE,
            "attention",
            f"{what} {version}" + ("" if usable else ", which needs a CUDA device"),
        )


def _encoders() -> Iterator[Finding]:
    version = _version("transformers")
    yield (
        Finding(
            Verdict.NOTE,
            "encoders",
            "transformers is not installed; live_avatar_14b needs it (pip install 'streamdiff[encoders]')",
        )
        if version is None
        else Finding(Verdict.OK, "encoders", f"transformers {version}")
    )


def _demo() -> Iterator[Finding]:
    missing = [name for name in ("matplotlib", "moonshine-voice") if _version(name) is None]
    yield (
        Finding(
            Verdict.NOTE,
            "demo",
            f"{', '.join(missing)} not installed; `streamdiff generate` then needs --image and --audio",
        )
        if missing
        else Finding(Verdict.OK, "demo", "a photograph and a voice are there")
    )
