"""Hostile sound and film: files that lie, are cut short, name other files, hold other numbers, and mutated ones."""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import av
import numpy as np

from tests.hostile.case import NAMES, NOT_FILES, Case, Content, Wants, sparse
from tests.hostile.pictures import encoded, mutated, picture
from tests.media.made_files import tone, write_film, write_sound

SECONDS = 0.4
RATE_HZ = 48_000
CONTAINERS: Mapping[str, str] = {
    ".wav": "pcm_s16le",
    ".flac": "flac",
    ".mp3": "libmp3lame",
    ".ogg": "libopus",
    ".oga": "flac",
    ".m4a": "aac",
    ".webm": "libopus",
    ".mka": "flac",
    ".aiff": "pcm_s16be",
    ".au": "pcm_s16be",
    ".caf": "pcm_s16le",
    ".avi": "pcm_s16le",
    ".ts": "aac",
    ".w64": "pcm_s16le",
    ".aac": "aac",
    ".flv": "aac",
}
_FRACTIONS = (0.1, 0.4, 0.7, 0.95)
_SLACK_S = 0.25
"""A coding frame or two, and the last video frame."""


def cases() -> Iterator[Case]:
    """Every sound, by `generate`; some by the other commands that read sound or film."""
    for name, suffix, content, wants, most_s in _sounds():
        file = f"voice{suffix}"
        yield Case(f"sound: {name}", _commands(file)[0], {file: content}, wants, most_s=most_s)
    for name, make in NOT_FILES.items():
        for number, argv in enumerate(_commands("voice.wav")):
            yield Case(f"sound: {name}, {number}", argv, {"voice.wav": make}, Wants.REFUSED)
    for number, name in enumerate(
        (*NAMES, "concat:a.wav|b.wav", "subfile,,start,0,end,0,,:voice.wav", "data:audio/wav,")
    ):
        argv = _commands(name)[number % len(_commands(name))]
        yield Case(f"sound: called {name[:12]!r}", argv, {"voice.wav": sound(".wav")}, Wants.REFUSED)
    for name in (
        "concat:a.wav|b.wav",
        "subfile,,start,44,end,99,,:voice.wav",
        "tcp:127.0.0.1:1",
        "%d.wav",
        "\udcff.wav",
    ):
        argv = ("generate", f"--audio={name}", "--out", "out.mp4")
        yield Case(
            f"sound: a file named {name[:12]!r}", argv, {name: sound(".wav")}, Wants.EITHER, most_s=SECONDS + 0.1
        )
    yield from _films()


def _commands(file: str) -> tuple[tuple[str, ...], ...]:
    return (
        ("generate", f"--audio={file}", "--out", "out.mp4"),
        ("talk", f"--audio={file}", "--out", "out.mp4", "--no-sheet"),
        ("train", "data", "--video", f"./{file}", "--out", "out"),
        ("avatar", "fit", f"--video={file}", "--out", "out.avatar"),
        ("avatar", "voice", f"--recording={file}", *_KOKORO),
    )


_KOKORO = ("--model", "none.onnx", "--voices", "none.npz", "--encoder", "none.pt", "--out", "out.npz")


@cache
def sound(suffix: str, seconds: float = SECONDS, channels: int = 1) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        samples_NS = tone(seconds, RATE_HZ, channels=channels)
        path = write_sound(Path(folder) / f"voice{suffix}", samples_NS, RATE_HZ, codec=CONTAINERS[suffix])
        return path.read_bytes()


def _sounds() -> Iterator[tuple[str, str, Content, Wants, float]]:
    for suffix in CONTAINERS:
        whole, long = sound(suffix), sound(suffix, 4.0)
        yield suffix, suffix, whole, Wants.MADE, SECONDS + _SLACK_S
        for kept in _FRACTIONS:
            cut = long[: int(len(long) * kept)]
            yield f"{suffix}, the first {kept:.0%}", suffix, cut, Wants.EITHER, 4.0 * kept + _SLACK_S
        for seed in range(5):
            yield f"{suffix}, mutation {seed}", suffix, mutated(whole, f"{suffix} {seed}"), Wants.EITHER, 20 * SECONDS
    for name, (suffix, content) in _liars().items():
        yield name, suffix, content, Wants.MADE, SECONDS + _SLACK_S
    for name, (suffix, content) in _references().items():
        yield name, suffix, content, Wants.REFUSED, 0.0
    for name, content in _waves().items():
        yield name, ".wav", content, Wants.EITHER, 1.0
    for name, content in _numbers().items():
        yield name, ".wav", content, Wants.REFUSED, 0.0


def _patched(data: bytes, found: bytes, offset: int, value: bytes) -> bytes:
    """Other bytes at an offset from a mark."""
    at = data.index(found) + offset
    return data[:at] + value + data[at + len(value) :]


def _ogg_checksum(page: bytes) -> int:
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = ((crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc


def _centuries() -> bytes:
    """An Ogg file whose last page says that it ends in centuries."""
    data = sound(".ogg")
    at = data.rindex(b"OggS")
    page = data[at : at + 6] + struct.pack("<q", 1 << 50) + data[at + 14 : at + 22] + bytes(4) + data[at + 26 :]
    return data[:at] + page[:22] + struct.pack("<I", _ogg_checksum(page)) + page[26:]


def _liars() -> Mapping[str, tuple[str, Content]]:
    wav, flac, m4a, webm = sound(".wav"), sound(".flac"), sound(".m4a"), sound(".webm")
    # 36 bits of samples follow 20 bits of rate, 3 of channels and 5 of depth.
    flac_info = flac.index(b"fLaC") + 8 + 13
    samples = bytes([flac[flac_info] | 0x0F, *b"\xff\xff\xff\xff"])
    duration = webm.index(b"\x44\x89\x88") + 3
    mp3, years = sound(".mp3"), b"\x7f\xff\xff\xff"
    return {
        "Opus of centuries": (".ogg", _centuries()),
        "FLAC of days": (".flac", flac[:flac_info] + samples + flac[flac_info + 5 :]),
        "MP3 of years": (".mp3", _patched(mp3, b"Xing" if b"Xing" in mp3 else b"Info", 8, b"\x7f\xff\xff\xff")),
        "WAV of 4 GB": (".wav", _patched(wav, b"data", 4, b"\xff\xff\xff\xff")),
        "WAV of no bytes": (".wav", _patched(wav, b"data", 4, b"\0\0\0\0")),
        "AU of 4 GB": (".au", _patched(sound(".au"), b".snd", 8, b"\x7f\xff\xff\xf0")),
        "MP4 of years": (".m4a", _patched(_patched(m4a, b"mdhd", 20, years), b"mvhd", 20, years)),
        "WebM of ages": (".webm", webm[:duration] + struct.pack(">d", 1e17) + webm[duration + 8 :]),
        "WebM of infinity": (".webm", webm[:duration] + struct.pack(">d", float("inf")) + webm[duration + 8 :]),
        "WebM of NaN": (".webm", webm[:duration] + struct.pack(">d", float("nan")) + webm[duration + 8 :]),
        "AVI of years": (".avi", _patched(sound(".avi"), b"auds", 32, b"\xff\xff\xff\x7f")),
    }  # fmt: skip


def _references() -> Mapping[str, tuple[str, Content]]:
    url = "http://127.0.0.1:1/voice.ts"
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{url}\n"
    dash = (
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='dynamic'><Period><AdaptationSet>"
        f"<Representation id='1' mimeType='audio/mp4'><BaseURL>{url}</BaseURL></Representation>"
        "</AdaptationSet></Period></MPD>"
    )
    texts = {
        "HLS": hls,
        "HLS without an end": hls + "#EXT-X-PLAYLIST-TYPE:EVENT\n",
        "HLS of a file": hls.replace(url, "file:///etc/hostname"),
        "HLS of a pipe": hls.replace(url, "pipe:0"),
        "HLS of a subfile": hls.replace(url, "subfile,,start,0,end,100,,:/etc/hostname"),
        "concat": f"ffconcat version 1.0\nfile {url}\n",
        "concat of a file": "ffconcat version 1.0\nfile /dev/zero\n",
        "DASH": dash,
        "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        "ffmetadata": ";FFMETADATA1\ntitle=x\n",
        "SRT": "1\n00:00:00,000 --> 99:00:00,000\nwords\n",
        "RTSP": "rtsptextrtsp://127.0.0.1:1/\n",
        "a filter graph": "sine=frequency=440",
        "SMIL": "<SMIL>",
    }
    found: dict[str, tuple[str, Content]] = {}
    for name, text in texts.items():
        for suffix in (".wav", ".m3u8"):
            found[f"{name} as {suffix}"] = (suffix, text.encode())
    found["a picture"] = (".png", encoded(picture(), "PNG"))
    found["a GIF"] = (".gif", encoded(picture(), "GIF"))
    return found


def _wav(
    samples: bytes, *, tag: int = 1, channels: int = 1, rate: int = 16_000, bits: int = 16, align: int | None = None
) -> bytes:
    align = channels * bits // 8 if align is None else align
    format_ = struct.pack("<HHIIHH", tag, channels, rate, (rate * align) & 0xFFFFFFFF, align & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(format_)) + format_ + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _waves() -> Mapping[str, Content]:
    noise = np.random.default_rng(0).integers(-9000, 9000, 6400, dtype=np.int16).tobytes()
    found: dict[str, Content] = {}
    for channels in (0, 2, 3, 8, 9, 64, 255, 65535):
        found[f"{channels} channels"] = _wav(noise * 4, channels=channels)
    for rate in (0, 1, 7999, 192_001, 2**31, 2**32 - 1):
        found[f"{rate} samples a second"] = _wav(noise, rate=rate)
    for bits in (0, 1, 7, 12, 24, 40, 64, 65535):
        found[f"{bits} bits"] = _wav(noise, bits=bits)
    for align in (0, 1, 3, 65535):
        found[f"{align} bytes in a row"] = _wav(noise, align=align)
    for tag in (0, 2, 3, 6, 7, 0x11, 0x31, 0x50, 0x55, 0x161, 0xFF, 0x2000, 0xFFFE, 0xFFFF):
        found[f"format {tag:#x}"] = _wav(noise, tag=tag, bits=8 if tag in (6, 7) else 16)
    return found


def _numbers() -> Mapping[str, Content]:
    quiet = np.full(4800, 0.1, np.float32)
    found: dict[str, Content] = {"a week of silence": sparse(20 << 30, _wav(b"")[:40] + b"\xff\xff\xff\xff")}
    for place, value in ((0, np.nan), (4799, np.nan), (0, np.inf), (2400, -np.inf), (7, 1e30), (9, 32768.0)):
        samples = quiet.copy()
        samples[place] = value
        found[f"floats, {value} at {place}"] = _wav(samples.tobytes(), tag=3, bits=32)
    found["doubles of 1e300"] = _wav(np.full(4800, 1e300).tobytes(), tag=3, bits=64)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
    found["no samples"] = out.getvalue()
    return found


def _films() -> Iterator[Case]:
    """Films, by what cuts and fits them."""
    for command in range(4):
        for number, (name, content) in enumerate(_film_files().items()):
            argv = _commands("voice.mp4")[command]
            yield Case(f"film: {name}, {command}", argv, {"voice.mp4": content}, Wants.EITHER, most_s=3.0)
            if number and command == 3:
                break


@cache
def film() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_film(path, num_chunks=2, flash_frame=3)
        return path.read_bytes()


def _film_files() -> Mapping[str, Content]:
    found: dict[str, Content] = {"short": film()}
    for kept in _FRACTIONS:
        found[f"the first {kept:.0%}"] = film()[: int(len(film()) * kept)]
    for seed in range(8):
        found[f"mutation {seed}"] = mutated(film(), f"film {seed}")
    found["16 megapixels"] = _large_film
    found["a gap of centuries"] = _late_film
    return found


def _large_film(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 8000, 8000, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(8000, 8000, "yuv420p")))
        container.mux(stream.encode(None))


def _late_film(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        packets = [packet for _ in range(3) for packet in stream.encode(av.VideoFrame(64, 64, "yuv420p"))]
        packets += stream.encode(None)
        packets[-1].pts = packets[-1].dts = 1 << 30
        container.mux(packets)
