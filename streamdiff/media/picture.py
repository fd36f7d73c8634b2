"""Pictures in and out.

Axes: T pictures, H height, W width, C RGB.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from streamdiff.errors import ConfigError, InputError
from streamdiff.facts import printable
from streamdiff.media.source import open_regular
from streamdiff.output import replacing

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Of pictures that are read. Others are refused: EPS would start a program, and the odd ones are little tested."""
_MIN_SIDE = 32
_MAX_PIXELS = 50_000_000
_MAX_WEBP_PIXELS = 25_000_000
"""Pillow's reader of WebP holds four copies, and has no other."""
_MANY_PIXELS = 16_000_000
_MAX_BYTES = 256_000_000
_MAX_SCANS = 100
_STRIP = 256
"""Rows of a deep picture that are converted at once."""


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """A picture as uint8 RGB [H, W, 3]: upright, opaque, cut around its centre and resized.

    JPEG, PNG, WebP, BMP, GIF and TIFF are read, whatever the name says: the first picture of several.
    EXIF orientation is obeyed, transparency becomes white, an embedded colour profile is converted to sRGB,
    more than 8 bits are brought to 8.

    Raises:
        InputError: no such file, not a picture, damaged, not finite, below 32 pixels a side, above 50 megapixels (of
            WebP: 25) or 256 MB.
        ConfigError: a size that no picture has.
    """
    if height <= 0 or width <= 0:
        raise ConfigError(f"a picture has a positive size, got {height}x{width}")
    image = open_picture(path)
    cut = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))
    return torch.from_numpy(np.array(cut, dtype=np.uint8))


def contact_sheet(frames_THWC: Tensor, path: str | Path, *, columns: int | None = None, gap: int = 4) -> None:
    """Save frames as one picture, row by row in a grid, for people who look; uint8 RGB [T, H, W, 3].

    Raises:
        ConfigError: no frames, or frames of another shape.
        InputError: the picture cannot be written.
    """
    shape = list(frames_THWC.shape)
    if frames_THWC.dtype != torch.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ConfigError(f"a contact sheet takes uint8 frames [T, H, W, 3], got {frames_THWC.dtype} {shape}")
    T, H, W, C = frames_THWC.shape
    columns = columns if columns is not None else math.ceil(math.sqrt(T))
    if columns < 1:
        raise ConfigError(f"a contact sheet has at least one column, got {columns}")
    rows = math.ceil(T / columns)
    sheet_HWC = torch.full((rows * (H + gap) - gap, columns * (W + gap) - gap, C), 255, dtype=torch.uint8)
    for index, frame_HWC in enumerate(frames_THWC.cpu()):
        top, left = index // columns * (H + gap), index % columns * (W + gap)
        sheet_HWC[top : top + H, left : left + W] = frame_HWC
    try:
        with replacing(path) as part:
            # As small within 2 % as at the default level, in half the time; other formats do not know the option.
            Image.fromarray(sheet_HWC.numpy()).save(part, compress_level=4)
    except ValueError as error:
        raise InputError(f"cannot write the contact sheet {path}: {error}; choose another place") from error


def open_picture(path: str | Path) -> Image.Image:
    """A picture at its own size: upright, opaque, sRGB with 8 bits; errors as `read_image`.

    One of more than 16 megapixels is shrunk by a whole number first.
    """
    path = Path(path)
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged facts beside the pixels, one line each
            _check_bytes(file)
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image)
                _check_scans(image, file)
                image.load()
                turn, smaller = _turn(image), _shrunk(image)
                return _srgb(smaller if turn is None else smaller.transpose(turn))
    except UnidentifiedImageError as error:
        raise InputError(f"cannot read a picture from {path}: not an image; give a JPEG or a PNG") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"cannot use the picture {path}: {error}; make it smaller") from error
    except InputError as error:
        raise InputError(f"cannot read a picture from {path}: {error}") from error
    except Exception as error:
        # A stranger's bytes may fail anywhere inside the reader.
        why = printable(error) or type(error).__name__
        raise InputError(f"cannot read a picture from {path}: it is damaged ({why}); give a whole file") from error


def _check_bytes(file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    if size > _MAX_BYTES:
        raise InputError(f"it has {size // 10**6} MB, more than {_MAX_BYTES // 10**6}; make it smaller")


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(image.size) < _MIN_SIDE:
        raise InputError(f"{width}x{height} pixels show no face; give at least {_MIN_SIDE} each way")
    most = _MAX_WEBP_PIXELS if image.format == "WEBP" else _MAX_PIXELS
    if width * height > most:
        raise InputError(f"{width}x{height} pixels are more than {most // 10**6} million; make it smaller")


_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
"""Of a JPEG, outside of the data of a scan: there 0xff is followed by 0x00 or by a restart marker."""


def _check_scans(image: Image.Image, file: BinaryIO) -> None:
    """A progressive JPEG goes over all pixels once a scan: a file of some kilobytes can hold thousands of scans."""
    if image.format not in ("JPEG", "MPO"):
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, scans = 2, 0
        while (marker := _MARKER.search(data, at)) is not None and marker[1] != b"\xd9":
            scans += marker[1] == b"\xda"
            if scans > _MAX_SCANS:
                raise InputError(f"it is a JPEG of more than {_MAX_SCANS} scans; save it anew")
            at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])


def _shrunk(image: Image.Image) -> Image.Image:
    """At most 16 megapixels, so that what follows may hold several copies."""
    factor = math.ceil(math.sqrt(image.width * image.height / _MANY_PIXELS))
    if factor == 1:
        return image
    if _is_deep(image):
        image = _from_deep(image)
    elif image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if _is_transparent(image) else "RGB")
    return image.reduce(factor)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes an EXIF orientation."""


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright, by its EXIF; damaged EXIF says nothing, as in browsers."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001  a stranger's bytes may fail anywhere inside the reader
        return None


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _srgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        return _from_deep(image)
    profile = image.info.get("icc_profile")
    if _is_transparent(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba).convert("RGB")
    return _from_profile(image, profile)


def _from_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert the colours of a tagged picture; an unusable profile counts as sRGB, as in browsers."""
    mode = image.mode if image.mode in ("RGB", "CMYK", "L") else "RGB"
    plain = image.convert(mode)
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            converted = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            return plain.convert("RGB")
        return converted if converted is not None else plain.convert("RGB")
    return plain.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey with more than 8 bits: integers span 16 bits, floats 0..1 (or whatever they reach)."""
    stored = np.asarray(image)
    top = 65535.0
    if image.mode.startswith("F"):
        least, most = float(stored.min()), float(stored.max())
        # A NaN anywhere makes both NaN.
        if not (math.isfinite(least) and math.isfinite(most)):
            raise InputError("it holds values that are not finite; export it again")
        top = max(1.0, most)
    grey = np.empty(stored.shape, np.uint8)
    for row in range(0, len(stored), _STRIP):
        values = stored[row : row + _STRIP].astype(np.float64)
        grey[row : row + _STRIP] = np.clip(values / top * 255 + 0.5, 0, 255)
    return Image.fromarray(grey).convert("RGB")
