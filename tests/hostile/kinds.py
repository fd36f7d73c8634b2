"""What a fuzzer mutates: for every kind of file a few good ones, and who reads it."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from streamdiff import presets
from streamdiff.avatar.kinematics import arkit64, json_lines
from streamdiff.avatar.window import save_motion
from streamdiff.trust.audit import AuditLog
from streamdiff.trust.keys import make_key, read_key
from tests.avatar.tiny_avatar import tiny_motion
from tests.hostile import pictures, sounds, weights
from tests.hostile.bundles import Parts, rehashed
from tests.hostile.case import Content
from tests.training.forcing_case import PROMPTS as CLIP_PROMPTS
from tests.training.forcing_case import clip_tensors

Argv = tuple[str, ...]
LONGEST_S = 60.0
"""Of a film that a mutated sound makes: twenty times a part of 0.4 s, at an eighth of the rate."""


@dataclass(frozen=True, slots=True)
class Good:
    """A file that nothing is wrong with."""

    name: str
    """Its path in the folder of a case."""
    format: str
    """One of `tests.hostile.formats.FORMATS`, or another word: bytes."""
    data: bytes


@dataclass(frozen=True, slots=True)
class Kind:
    """Files of one kind, and the commands that read them."""

    good: Callable[[], Sequence[Good]]
    readers: Callable[[str], Sequence[Argv]]
    """Commands for a file of this name."""
    beside: Callable[[], Mapping[str, Content]] = dict
    """Other files that the commands need."""
    finish: Callable[[bytes], bytes] = field(default=lambda data: data)
    """Makes right what a stranger would make right: a hash of the content."""
    stdin: bool = False


def _file(write: Callable[[Path], object], name: str = "file") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()


def _pictures() -> Sequence[Good]:
    formats = {"PNG": "png", "JPEG": "jpeg", "WEBP": "riff", "TIFF": "tiff"}
    small = pictures.picture(48, 32)
    found = [Good(f"face.{k.lower()}", formats.get(k, "bytes"), pictures.encoded(small, k)) for k in pictures.KNOWN]
    deep = pictures.png(48, 32, bits=16, kind=6)
    palette = pictures.encoded(small.convert("P"), "PNG")
    profile = pictures.encoded(small, "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0", dpi=(72, 72))
    return [*found, Good("deep.png", "png", deep), Good("p.png", "png", palette), Good("p.jpeg", "jpeg", profile)]


def _read_pictures(file: str) -> Sequence[Argv]:
    return (
        *[("read", "picture", file)] * 8,
        ("generate", f"--image={file}", "--seconds", "0.1", "--out", "out.mp4"),
        ("avatar", "create", f"--photo={file}", "--out", "out.avatar"),
        ("talk", "Yes.", f"--avatar={file}", "--out", "out.mp4", "--no-sheet"),
    )


_SOUND_FORMATS = {
    **dict.fromkeys((".wav", ".avi"), "riff"),
    **dict.fromkeys((".ogg", ".oga"), "ogg"),
    **dict.fromkeys((".webm", ".mka"), "ebml"),
    ".flac": "flac",
    ".m4a": "boxes",
    ".aiff": "iff",
}


def _sounds() -> Sequence[Good]:
    return [Good(f"voice{s}", _SOUND_FORMATS.get(s, "bytes"), sounds.sound(s)) for s in sounds.CONTAINERS]


def _read_sounds(file: str) -> Sequence[Argv]:
    return (
        *[("read", "sound", file)] * 8,
        ("read", "recordings", file),
        ("talk", f"--audio={file}", "--out", "out.mp4", "--no-sheet"),
        ("generate", f"--audio={file}", "--out", "out.mp4"),
    )


def _films() -> Sequence[Good]:
    return [Good("film.mp4", "boxes", sounds.film()), Good("film.mkv", "ebml", _matroska())]


def _matroska() -> bytes:
    import av

    def write(path: Path) -> None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(30):
                container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
            container.mux(stream.encode(None))

    return _file(write, "film.mkv")


def _read_films(file: str) -> Sequence[Argv]:
    return (
        *[("read", "footage", file)] * 4,
        *[("read", "recorded", file)] * 4,
        *[("read", "credentials", file)] * 2,
        ("read", "sound", file),
        ("train", "data", "--video", f"./{file}", "--out", "out"),
        ("avatar", "fit", f"--video={file}", "--out", "out.avatar"),
    )


def _weights() -> Sequence[Good]:
    files = {"DiT": weights.DIT, "codec": weights.CODEC, "LoRA": "lora.safetensors", "light decoder": "l.safetensors"}
    found = [Good(files[place], "tensors", save(state)) for place, state in weights.states().items()]
    out = io.BytesIO()
    torch.save(weights.states()["light decoder"], out)
    return [*found, Good("l.pth", "zip", out.getvalue())]


def _read_weights(file: str) -> Sequence[Argv]:
    argv = (*weights.COMMAND, "--checkpoint", "weights")
    if file.startswith("l."):
        return (*[("read", "light decoder", file)] * 3, (*argv, "--light-decoder", file))
    return ((*argv, "--lora", file) if file.startswith("lora") else argv,)


def _beside_weights() -> Mapping[str, Content]:
    return {weights.DIT: save(weights.states()["DiT"]), weights.CODEC: save(weights.states()["codec"])}


def _bundles() -> Sequence[Good]:
    return [Good("face.avatar", "tensors", Parts().written())]


def _read_bundles(file: str) -> Sequence[Argv]:
    talk = ("talk", "Yes.", f"--avatar={file}", "--out", "out.mp4", "--no-sheet")
    return (*[("read", "bundle", file)] * 8, ("avatar", "inspect", file), talk)


def _motions() -> Sequence[Good]:
    return [Good("motion.safetensors", "tensors", _file(lambda path: save_motion(tiny_motion(), path)))]


def _read_motions(file: str) -> Sequence[Argv]:
    talk = ("talk", "Yes.", f"--motion={file}", "--out", "out.mp4", "--no-sheet")
    return (*[("read", "motion", file)] * 4, talk)


def _npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def _voices() -> Sequence[Good]:
    """Styles of Kokoro, a speaker encoder, takes of a recording."""
    styles = np.random.default_rng(0).normal(0, 0.1, (5, 1, 256)).astype(np.float32)
    lstm, linear = torch.nn.LSTM(40, 256, 3, batch_first=True), torch.nn.Linear(256, 256)
    state = {f"lstm.{k}": v for k, v in lstm.state_dict().items()}
    state |= {f"linear.{k}": v for k, v in linear.state_dict().items()}
    out = io.BytesIO()
    torch.save({"model_state": state}, out)
    takes = {f"audio_{n}": np.arange(4000, dtype=np.int16) for n in range(3)}
    return [
        Good("styles.npz", "zip", _npz(af=styles, bm=styles * 2)),
        Good("styles.bin", "bytes", styles.tobytes()),
        Good("speaker.pt", "zip", out.getvalue()),
        Good("takes.npz", "zip", _npz(**takes)),
    ]


def _read_voices(file: str) -> Sequence[Argv]:
    reader = {"styles": "styles", "speaker": "speaker", "takes": "recordings"}[Path(file).stem]
    return (("read", reader, file),)


def _heads() -> Sequence[Good]:
    points = np.random.default_rng(0).normal(0, 1, (5, 3)).astype(np.float32)
    faces = np.array([[0, 1, 2, 3], [0, 1, 4, -1]], np.int32)
    names, moves = np.array(["jawOpen"]), points[None] * 0.1
    modes = {"expression_names": names, "expression": moves, "identity": np.concatenate([moves, moves])}
    return [Good("head.npz", "zip", _npz(neutral=points, faces=faces, **modes))]


def _read_heads(file: str) -> Sequence[Argv]:
    return (*[("read", "head", file)] * 8, ("train", "data", f"--head={file}", "--out", "out", "--clips", "1"))


_FORCING = ("train", "forcing", "--preset", "tiny", "--batch", "1", "--chunks", "2", "--steps", "2", "--data", "clips")


@functools.cache
def _clips() -> bytes:
    """Two to learn from, and 16 that are held out."""
    config = presets.tiny()
    return save(clip_tensors(config, 18), {"prompts": json.dumps(CLIP_PROMPTS), "config": config.name})


@functools.cache
def _checkpoint() -> bytes:
    """Of a run that one step of two was made of."""
    from tests.hostile.jail import Jail

    with tempfile.TemporaryDirectory() as name, Jail() as jail:
        folder = Path(name)
        (folder / "clips").mkdir()
        (folder / "clips" / "latents.safetensors").write_bytes(_clips())
        ended = jail.run((*_FORCING, "--out", "run"), folder)
        assert ended.status == 0, ended.err
        return (folder / "run" / "checkpoint.safetensors").read_bytes()


def _checkpoints() -> Sequence[Good]:
    return [Good("run/checkpoint.safetensors", "tensors", _checkpoint())]


def _read_checkpoints(_file: str) -> Sequence[Argv]:
    return ((*_FORCING, "--out", "run", "--resume"),)


def _latents() -> Sequence[Good]:
    """What is learned from: latents, and shards of clips."""
    draw = np.random.default_rng(0)
    shard = {
        "frames": torch.from_numpy(draw.integers(0, 256, (2, 5, 16, 16, 3), np.uint8)),
        "photo": torch.from_numpy(draw.integers(0, 256, (2, 16, 16, 3), np.uint8)),
        "sound": torch.from_numpy(draw.integers(-999, 999, (2, 3200), np.int16)),
    }
    facts = {"prompts": json.dumps(["a person talks", "a person nods"]), "start": "0"}
    return [
        Good("clips/latents.safetensors", "tensors", _clips()),
        Good("faces-0.safetensors", "tensors", save(shard, facts)),
    ]


def _read_latents(file: str) -> Sequence[Argv]:
    return (("read", "clips", file),) if file.startswith("faces") else ((*_FORCING, "--out", "out"),)


def _beside_latents() -> Mapping[str, Content]:
    return {"clips/latents.safetensors": _clips()}


def _lines() -> Sequence[Good]:
    """Files of JSON and of lines: motion, audit logs, signed statements, keys."""
    rest_E = arkit64().rest_E
    track = "\n".join(json_lines(np.stack([rest_E] * 4), arkit64())) + "\n"

    def log(path: Path) -> None:
        written = AuditLog(path)
        for number in range(4):
            written.write("begin", session=f"s{number}", avatar="a" * 64)

    with tempfile.TemporaryDirectory() as folder:
        public = make_key(Path(folder) / "key", "Ann")
        sealed = read_key(Path(folder) / "key").seal("application/x", b'{"a": 1}')
        keys = f"# whom to trust\n{public.line}\n".encode()
    return [
        Good("motion.jsonl", "lines", track.encode()),
        Good("audit.jsonl", "lines", _file(log, "audit.jsonl")),
        Good("statement.json", "lines", sealed.encode()),
        Good("trusted.txt", "lines", keys),
    ]


def _read_lines(file: str) -> Sequence[Argv]:
    readers = {"motion": "track", "audit": "log", "statement": "statement"}
    if Path(file).stem in readers:
        return (("read", readers[Path(file).stem], file),)
    return (("avatar", "inspect", "good.avatar", f"--trust={file}"),)


def _texts() -> Sequence[Good]:
    # Short: what is said has to be drawn as well, and mutations repeat it.
    said = "Dr. 12/31 owes $4.50 -- \u201cyes\u201d; e.g. 1/2."
    mixed = "\u00c9tude \u0663 \U0001f600 \u6f22\u5b57 x\u0301 \u202eabc I'm MMXXVI"
    return [Good("said", "bytes", said.encode()), Good("said", "bytes", mixed.encode())]


def _read_texts(_file: str) -> Sequence[Argv]:
    return (("talk", "-", "--out", "out.mp4", "--no-sheet"),)


KINDS: Mapping[str, Kind] = {
    "pictures": Kind(_pictures, _read_pictures),
    "sounds": Kind(_sounds, _read_sounds),
    "films": Kind(_films, _read_films),
    "weights": Kind(_weights, _read_weights, _beside_weights),
    "bundles": Kind(_bundles, _read_bundles, finish=rehashed),
    "motions": Kind(_motions, _read_motions),
    "voices": Kind(_voices, _read_voices),
    "heads": Kind(_heads, _read_heads),
    "checkpoints": Kind(_checkpoints, _read_checkpoints, _beside_latents),
    "latents": Kind(_latents, _read_latents),
    "lines": Kind(_lines, _read_lines, lambda: {"good.avatar": Parts().written()}),
    "texts": Kind(_texts, _read_texts, stdin=True),
}
