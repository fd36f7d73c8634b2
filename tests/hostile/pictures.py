"""Hostile pictures: other formats, truncated, huge, deep, animated, with broken facts, and mutated."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tests.hostile.case import NAMES, NOT_FILES, Case, Content, Wants, sparse

KNOWN = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
OTHER = (
    "EPS",
    "PPM",
    "ICO",
    "TGA",
    "PCX",
    "ICNS",
    "SGI",
    "DDS",
    "JPEG2000",
    "PDF",
    "SPIDER",
    "MSP",
    "XBM",
    "AVIF",
)
_FRACTIONS = (0.02, 0.1, 0.3, 0.6, 0.9)


def cases() -> Iterator[Case]:
    """Every picture, each by one of the commands that read pictures."""
    for number, (name, suffix, content, wants) in enumerate(_pictures()):
        yield _asked(f"picture: {name}", number, f"face{suffix}", content, wants)
    for name, make in NOT_FILES.items():
        for shift in range(3):
            yield Case(f"picture: {name}, {shift}", _commands("face.png")[shift], {"face.png": make}, Wants.REFUSED)
    for number, name in enumerate(NAMES):
        argv = _commands(name)[number % 3]
        yield Case(f"picture: called {name[:12]!r}", argv, {}, Wants.REFUSED)


def _commands(file: str) -> tuple[tuple[str, ...], ...]:
    return (
        ("generate", f"--image={file}", "--seconds", "0.1", "--out", "out.mp4"),
        ("avatar", "create", f"--photo={file}", "--out", "out.avatar"),
        ("talk", "Yes.", f"--avatar={file}", "--out", "out.mp4", "--no-sheet"),
    )


def _asked(name: str, number: int, file: str, content: Content, wants: Wants) -> Case:
    """Two of the commands refuse noise, which shows no face; so what is sure to be made or refused is asked of one."""
    argv = _commands(file)[number % 3 if wants is Wants.EITHER else 0]
    return Case(name, argv, {file: content}, wants)


@cache
def picture(width: int = 96, height: int = 64) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


_MODES = {"MSP": "1", "XBM": "1", "GIF": "P", "SPIDER": "F", "TGA": "RGBA"}


def _pictures() -> Iterator[tuple[str, str, Content, Wants]]:
    whole = {kind: encoded(picture(), kind) for kind in KNOWN}
    for kind, data in whole.items():
        yield kind, f".{kind.lower()}", data, Wants.MADE
        yield f"{kind} under another name", ".dat", data, Wants.MADE
        for fraction in _FRACTIONS:
            yield f"{kind}, the first {fraction:.0%}", ".png", data[: int(len(data) * fraction)], Wants.REFUSED
        for seed in range(14):
            yield f"{kind}, mutation {seed}", ".png", mutated(data, f"{kind} {seed}"), Wants.EITHER
    for kind in OTHER:
        data = encoded(picture().convert(_MODES.get(kind, "RGB")), kind)
        yield f"{kind}", f".{kind.lower()}", data, Wants.REFUSED
        yield f"{kind} as a PNG", ".png", data, Wants.REFUSED
    for name, content in _huge().items():
        yield name, ".png", content, Wants.REFUSED
    for name, (content, wants) in {**_deep(), **_moving(), **_facts(whole), **_bombs()}.items():
        yield name, ".png", content, wants


def mutated(data: bytes, seed: str, most: int = 8) -> bytes:
    """A few bytes changed, half of them in the head, where sizes and offsets stand."""
    draw, found = random.Random(seed), bytearray(data)
    for _ in range(draw.randint(1, most)):
        at = draw.randrange(min(64, len(found))) if draw.random() < 0.5 else draw.randrange(len(found))
        found[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    if draw.random() < 0.2:
        at, count = draw.randrange(len(found)), draw.randint(1, 40)
        found[at : at + count] = found[at : at + count] * draw.randint(0, 3)
    return bytes(found)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *, bits: int = 8, kind: int = 0, interlaced: int = 0, body: bytes = b"") -> bytes:
    """A PNG of any claim; without a body, of nothing but zeros."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    packed = body or _zeros(height * (1 + (width * bits * channels + 7) // 8) + (height if interlaced else 0))
    palette = chunk(b"PLTE", bytes(768)) if kind == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _zeros(count: int) -> bytes:
    packer, step = zlib.compressobj(1), bytes(1 << 22)
    parts = [packer.compress(step[: min(len(step), count - done)]) for done in range(0, count, len(step))]
    return b"".join(parts) + packer.flush()


def _huge() -> Mapping[str, Content]:
    little = zlib.compress(b"little")
    jpeg, gif = bytearray(encoded(picture(), "JPEG")), bytearray(encoded(picture(), "GIF"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    gif[6:10] = b"\xff\xff\xff\xff"
    bmp, webp = bytearray(encoded(picture(), "BMP")), bytearray(encoded(picture(), "WEBP", lossless=True))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    return {
        "PNG that claims all pixels": png(2**31 - 1, 2**31 - 1, body=little),
        "PNG of no pixels": png(0, 0, body=little),
        "PNG one pixel high": png(2**31 - 1, 1, body=little),
        "PNG that claims 60000x60000": png(60_000, 60_000, body=little),
        "JPEG that claims 65535x65535": bytes(jpeg),
        "GIF that claims 65535x65535": bytes(gif),
        "BMP that claims 60000x60000": bytes(bmp),
        "WebP that claims 16384x16384": bytes(webp[:21]) + b"\xff\xff\xff\x0f" + bytes(webp[25:]),
        "PNG of 120 megapixels in 16 bits": lambda path: path.write_bytes(png(12_000, 10_000, bits=16)),
        "PNG of 100 megapixels in colour": lambda path: path.write_bytes(png(10_000, 10_000, kind=2)),
        "PNG of 400 megapixels in one bit": lambda path: path.write_bytes(png(20_000, 20_000, bits=1)),
        "PNG of 100 megapixels, interlaced": lambda path: path.write_bytes(
            png(10_000, 10_000, interlaced=1, body=_zeros(101_000_000))
        ),
        "TIFF of 120 megapixels in 16 bits": _large_tiff,
        "WebP of 36 megapixels": lambda path: Image.new("RGB", (6000, 6000)).save(
            path, "WEBP", lossless=True, method=0
        ),
        "PNG of 20 GB": sparse(20 << 30, png(96, 64)),
        "PNG, and 600 MB behind it": sparse(600 << 20, png(96, 64)),
    }


def _large_tiff(path: Path) -> None:
    Image.new("I;16", (12_000, 10_000)).save(path, "TIFF", compression="tiff_deflate")


def _deep() -> Mapping[str, tuple[Content, Wants]]:
    grey = np.random.default_rng(0).random((64, 96)).astype(np.float32)

    def tiff(values: np.ndarray) -> bytes:
        return encoded(Image.fromarray(values), "TIFF")

    def one(value: float) -> bytes:
        spoilt = grey.copy()
        spoilt[3, 5] = value
        return tiff(spoilt)

    return {
        "floats": (tiff(grey), Wants.MADE),
        "floats, one NaN": (one(np.nan), Wants.REFUSED),
        "floats, one Inf": (one(np.inf), Wants.REFUSED),
        "floats, one -Inf": (one(-np.inf), Wants.REFUSED),
        "floats, all NaN": (tiff(np.full_like(grey, np.nan)), Wants.REFUSED),
        "floats of 1e38": (tiff(grey * np.float32(1e38)), Wants.EITHER),
        "floats below zero": (tiff(-grey), Wants.EITHER),
        "32-bit integers": (tiff((grey * 2**31).astype(np.int32)), Wants.EITHER),
        "16-bit PNG": (encoded(Image.fromarray((grey * 65535).astype(np.uint16)), "PNG"), Wants.MADE),
        "16-bit RGB, interlaced": (png(96, 64, bits=16, kind=2, interlaced=1, body=_zeros(60_000)), Wants.MADE),
        "40 megapixels in 16 bits": (lambda path: path.write_bytes(png(8000, 5000, bits=16)), Wants.MADE),
        "40 megapixels, interlaced": (
            lambda path: path.write_bytes(png(8000, 5000, kind=2, interlaced=1, body=_zeros(121_000_000))),
            Wants.EITHER,
        ),
        "40 megapixels with transparency": (lambda path: path.write_bytes(png(8000, 5000, kind=6)), Wants.MADE),
        "40 megapixels of a palette": (lambda path: path.write_bytes(png(8000, 5000, kind=3)), Wants.MADE),
        "48 megapixels of floats": (
            lambda path: Image.new("F", (8000, 6000)).save(path, "TIFF", compression="tiff_deflate"),
            Wants.EITHER,
        ),
    }


def _moving() -> Mapping[str, tuple[Content, Wants]]:
    frames = [picture().rotate(n) for n in range(60)]
    return {
        "animated GIF": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), Wants.MADE),
        "animated PNG": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), Wants.MADE),
        "animated WebP": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), Wants.MADE),
        "TIFF of many pages": (encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), Wants.MADE),
        "JPEG of several pictures": (encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), Wants.MADE),
    }


def _facts(whole: Mapping[str, bytes]) -> Mapping[str, tuple[Content, Wants]]:
    found: dict[str, tuple[Content, Wants]] = {}
    draw = random.Random(5)
    for value in (0, 3, 8, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = value
        found[f"turned by {value}"] = (encoded(picture(), "JPEG", exif=exif), Wants.MADE)
    for seed in range(8):
        blob = b"Exif\0\0" + (b"II*\0" if seed % 2 else b"MM\0*") + draw.randbytes(60)
        found[f"broken EXIF {seed}"] = (encoded(picture(), "JPEG", exif=blob), Wants.MADE)
    loop = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIHI", 1, 0x8769, 4, 1, 8, 0) + struct.pack("<I", 8)
    found["EXIF that points at itself"] = (encoded(picture(), "JPEG", exif=loop), Wants.MADE)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        found[f"{kind} with a broken profile"] = (
            encoded(picture(), kind, icc_profile=draw.randbytes(600)),
            Wants.MADE,
        )
    return found


def _swelling(name: bytes) -> Content:
    start = png(96, 64)
    return lambda path: path.write_bytes(start[:33] + chunk(name, b"a\0\0" + _zeros(1 << 30)) + start[33:])


def _tiled() -> bytes:
    """A TIFF of 64x64 pixels in one tile of 60,000 x 60,000."""
    tags = [
        (256, 64),
        (257, 64),
        (258, 8),
        (259, 1),
        (262, 1),
        (277, 1),
        (322, 60_000),
        (323, 60_000),
        (324, 8),
        (325, 9),
    ]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body + bytes(4)


def _bombs() -> Mapping[str, tuple[Content, Wants]]:
    start = png(96, 64)
    head, rest = start[:33], start[33:]
    progressive = encoded(Image.new("L", (6000, 6000), 90), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    many = progressive[:last] + progressive[last:-2] * 4000 + b"\xff\xd9"
    return {
        "text that swells": (_swelling(b"zTXt"), Wants.EITHER),
        "a profile that swells": (_swelling(b"iCCP"), Wants.EITHER),
        "100,000 small chunks": (head + chunk(b"tEXt", b"a\0b") * 100_000 + rest, Wants.EITHER),
        "TIFF of one huge tile": (_tiled(), Wants.REFUSED),
        "JPEG of 4,000 scans": (many, Wants.REFUSED),
    }
