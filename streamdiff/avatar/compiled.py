"""One person's engine, compiled ahead: a file that makes frames from coefficients, and needs nothing else.

`compile_bundle` traces the whole way of a frame (`WarpRenderer`) with this person's picture, flow and mouth inside it.
What comes out is a graph of ATen operations (``torch.export``), which gives the renderer's own bits; or, with
``native``, machine code made by Inductor for this kind of machine, equal to within one grey level. Opening it costs no
fitting and no tracing: a person is as quick to put on as a file is to read.

A native engine is code: open only what you have compiled yourself.

    A frames   E coefficients   H, W pixels
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.kinematics import arkit64
from streamdiff.avatar.render import WarpRenderer, as_motion
from streamdiff.errors import BackendError, CheckpointError, InputError

ENGINE_SUFFIX = ".engine"
_FORMAT = "streamdiff.engine.1"
_FACTS, _GRAPH = "facts.json", "frame.pt2"


class _Frame(nn.Module):
    """One frame, ``[E]`` to ``[H, W, 3]``, as something that can be traced."""

    def __init__(self, renderer: WarpRenderer) -> None:
        super().__init__()
        self._draw = renderer.draw

    def forward(self, coefs_E: Tensor) -> Tensor:
        return self._draw(coefs_E)


def compile_bundle(
    bundle: IdentityBundle, path: str | Path, *, device: str | torch.device = "cpu", native: bool = False
) -> None:
    """Write the engine of one person.

    Args:
        path: where to; ends in ``.engine``.
        device: what it will run on; its kind is fixed in the file.
        native: machine code instead of a graph. Needs a C++ compiler (and nvcc's tools on CUDA), here and now only.

    Raises:
        BackendError: no compiler, or none that works.
        InputError: the file cannot be written.
    """
    device = torch.device(device)
    renderer = WarpRenderer(bundle, device=device)
    example_E = torch.from_numpy(renderer.spec.rest_E.copy()).to(device)
    with torch.no_grad():
        program = torch.export.export(_Frame(renderer), (example_E,))
    graph = io.BytesIO()
    # Both ways of writing look into torch's own tables with deprecated calls, and wonder about our views of one tensor.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if native:
            graph.write(_machine_code(program, device))
        else:
            torch.export.save(program, graph)
    facts = {
        "format": _FORMAT,
        "name": bundle.name,
        "bundle_sha256": bundle.sha256,
        "size": bundle.size,
        "spec": renderer.spec.name,
        "style": dict(bundle.style),
        "device": device.type,
        "native": native,
        "torch": torch.__version__,
    }
    try:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(_FACTS, json.dumps(facts, indent=1))
            archive.writestr(_GRAPH, graph.getvalue())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}; choose another place") from error


def _machine_code(program: torch.export.ExportedProgram, device: torch.device) -> bytes:
    from torch._inductor import aoti_compile_and_package  # it takes seconds to import

    package = io.BytesIO()
    try:
        with _library_sampling(device):
            aoti_compile_and_package(program, package_path=package)
    except (RuntimeError, OSError) as error:
        raise BackendError(f"Inductor could not compile this engine ({error}); compile without --native") from error
    return package.getvalue()


@contextmanager
def _library_sampling(device: torch.device) -> Generator[None]:
    """On a CPU, leave ``grid_sample`` to torch: Inductor's own is scalar code, which made frames 3 times as slow."""
    from torch._inductor.decomposition import decompositions

    kept: dict[Any, Any] = {}
    if device.type == "cpu":
        for operator in (torch.ops.aten.grid_sampler_2d.default, torch.ops.aten.upsample_bilinear2d.vec):
            if operator in decompositions:
                kept[operator] = decompositions.pop(operator)
    try:
        yield
    finally:
        decompositions.update(kept)


class CompiledRenderer:
    """Draws the person of an engine; the same protocol as `WarpRenderer`, and as stateless.

    Raises:
        InputError: no such file.
        CheckpointError: a file of something else, or made by another torch.
        BackendError: an engine for a device that is not here.
    """

    def __init__(self, path: str | Path) -> None:
        self.facts, graph = _read(Path(path))
        self.spec = arkit64()
        self.device = torch.device(self.facts["device"])
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise BackendError(f"{path} was compiled for CUDA, which is not here; compile it with --device cpu")
        self._frame: Callable[[Tensor], Tensor] = _loaded(graph, path, native=self.facts["native"])

    @property
    def size(self) -> int:
        """Side of a frame, pixels."""
        return int(self.facts["size"])

    @property
    def name(self) -> str:
        """Of the person."""
        return str(self.facts["name"])

    @property
    def style(self) -> dict[str, float]:
        """How this person moves, by name."""
        return dict(self.facts["style"])

    @torch.inference_mode()
    def render(self, motion_AE: Tensor | NDArray[np.float32]) -> Tensor:
        """Frames ``[A, H, W, 3]``, uint8 sRGB, on the engine's device; errors as `WarpRenderer.render`."""
        motion = as_motion(motion_AE, self.spec).to(self.device)
        frames = torch.empty(len(motion), self.size, self.size, 3, dtype=torch.uint8, device=self.device)
        for frame, coefs_E in zip(frames, motion, strict=True):
            frame.copy_(self._frame(coefs_E))
        return frames


def _read(path: Path) -> tuple[dict[str, Any], io.BytesIO]:
    if not path.is_file():
        raise InputError(f"no engine at {path}; make one: streamdiff avatar compile PERSON.avatar --out {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            facts = json.loads(archive.read(_FACTS))
            graph = io.BytesIO(archive.read(_GRAPH))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no engine: {error}; make it with streamdiff avatar compile") from error
    if facts.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is an engine of format {facts.get('format')!r}, not {_FORMAT!r}; compile again")
    if facts["torch"] != torch.__version__:
        raise CheckpointError(
            f"{path} was compiled by torch {facts['torch']}, this is {torch.__version__}; compile it again"
        )
    return facts, graph


def _loaded(graph: io.BytesIO, path: str | Path, *, native: bool) -> Callable[[Tensor], Tensor]:
    try:
        if native:
            from torch._inductor import aoti_load_package

            return aoti_load_package(graph)
        return torch.export.load(graph).module()
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"the graph in {path} does not load ({error}); compile it again") from error
