"""Clips on disk, some to a file: written once, read by number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamdiff.errors import InputError
from streamdiff.facts import parse_json
from streamdiff.tensorfile import save_tensors
from streamdiff.training.data.clip import TRUTH, Clip, ClipSource
from streamdiff.training.data.drawn import DrawnClips
from streamdiff.training.data.recorded import RecordedClips


def write_shards(
    source: DrawnClips | ClipSource,
    folder: Path,
    *,
    per_shard: int = 40,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write all clips, ``per_shard`` to a file; a shard that is there is kept.

    ``part = (k, n)`` writes every n-th shard beginning with the k-th, for n processes side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(source), per_shard)):
        stop = min(len(source), start + per_shard)
        path = folder / f"faces-{number:05d}.safetensors"
        if number % part[1] != part[0]:
            continue
        if path.is_file():
            if progress is not None:
                progress(stop - start)
            continue
        clips: list[Clip] = []
        whole = isinstance(source, DrawnClips | RecordedClips)
        made = source.clips(start, stop) if whole else map(source.clip, range(start, stop))
        for clip in made:
            clips.append(clip)
            if progress is not None:
                progress(1)
        _write_shard(clips, path, start)


def _write_shard(clips: Sequence[Clip], path: Path, start: int) -> None:
    """One file of clips, the first of them number ``start``: written beside and moved into place."""
    tensors: dict[str, Tensor] = {
        "frames": torch.from_numpy(np.stack([c.frames_THWC for c in clips])),
        "photo": torch.from_numpy(np.stack([c.photo_HWC for c in clips])),
        "sound": torch.from_numpy(np.stack([np.round(c.sound_S * 32767).astype(np.int16) for c in clips])),
    }
    truths = [c.truth_TE for c in clips if c.truth_TE is not None]
    if len(truths) == len(clips):
        tensors["truth"] = torch.from_numpy(np.stack(truths))
    facts = {"prompts": json.dumps([c.prompt for c in clips]), "start": str(start), "truth": json.dumps(TRUTH)}
    save_tensors(tensors, path, facts)


_KINDS = {"frames": ("U8", 5), "photo": ("U8", 4), "sound": ("I16", 2)}
"""Kind of the numbers, and axes, of which the first counts the clips."""


def _shape_of(file: Any) -> tuple[int, ...]:
    """Of the frames, once all that a clip is taken from is found to be there; ValueError: something is not."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (kind, axes) in _KINDS.items():
        found = file.get_slice(name)
        shapes[name] = tuple(found.get_shape())
        if found.get_dtype() != kind or len(shapes[name]) != axes or shapes[name][0] != shapes["frames"][0]:
            raise ValueError(f"{name} is {found.get_dtype()} {list(shapes[name])}")
    if "truth" in file.keys() and tuple(file.get_slice("truth").get_shape())[:1] != shapes["frames"][:1]:  # noqa: SIM118
        raise ValueError("it has no truth for each of its clips")
    return shapes["frames"]


class Shards:
    """Clips on disk, by number.

    Raises InputError when the folder has none, or a file in it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("faces-*.safetensors"))
        if not self.paths:
            raise InputError(f"there are no clips in {folder}; make some with: streamdiff train data --out {folder}")
        self._places: list[tuple[int, int]] = []
        self._prompts: list[list[str]] = []
        self._open: dict[int, Any] = {}
        for number, path in enumerate(self.paths):
            try:
                with safe_open(path, "pt") as file:
                    shape = _shape_of(file)
                    prompts = parse_json((file.metadata() or {})["prompts"])
                    if not isinstance(prompts, list) or len(prompts) != shape[0]:
                        raise ValueError("it has no prompt for each of its clips")
                    self._prompts.append(list(map(str, prompts)))
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                raise InputError(f"{path} is not a shard of clips ({error}); remove it and make it anew") from error
            self.num_frames, self.size = int(shape[1]), int(shape[2])
            self._places += [(number, i) for i in range(shape[0])]

    def __len__(self) -> int:
        return len(self._places)

    def _file(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(self.paths[number], "pt").__enter__()
        return self._open[number]

    def frames(self, index: int, first: int = 0, count: int | None = None) -> Tensor:
        """Frames ``[T, H, W, 3]`` uint8 of one clip, from ``first`` on."""
        number, i = self._places[index]
        stop = self.num_frames if count is None else first + count
        return self._file(number).get_slice("frames")[i : i + 1, first:stop][0]

    def clip(self, index: int) -> Clip:
        number, i = self._places[index]
        file = self._file(number)
        truth = file.get_slice("truth")[i].numpy() if "truth" in file.keys() else None  # noqa: SIM118
        return Clip(
            frames_THWC=self.frames(index).numpy(),
            photo_HWC=file.get_slice("photo")[i].numpy(),
            sound_S=file.get_slice("sound")[i].numpy().astype(np.float32) / 32767,
            prompt=self._prompts[number][i],
            truth_TE=truth,
        )
