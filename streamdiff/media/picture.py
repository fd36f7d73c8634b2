"""Pictures in and out.

Axes: T pictures, H height, W width, C RGB.
"""

from __future__ import annotations

import math
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from streamdiff.errors import ConfigError, InputError

_MIN_SIDE = 32
_MAX_PIXELS = 120_000_000


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """A picture of any kind as uint8 RGB [H, W, 3]: upright, opaque, cut around its centre and resized.

    EXIF orientation is obeyed, transparency becomes white, an embedded colour profile is converted to sRGB,
    16-bit values are brought to 8; of an animation the first picture counts.

    Raises:
        InputError: no such file, not a picture, damaged, below 32 pixels a side or above 120 megapixels.
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
        Image.fromarray(sheet_HWC.numpy()).save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the contact sheet {path}: {error}; choose another place") from error


def open_picture(path: str | Path) -> Image.Image:
    """A picture of any kind at its own size: upright, opaque, sRGB with 8 bits; errors as `read_image`."""
    path = Path(path)
    if not path.is_file():
        what = "it is not a file" if path.exists() else "there is no such file"
        raise InputError(f"cannot read a picture from {path}: {what}; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            _check_size(path, image.size)
            image.load()
            return _srgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise InputError(f"cannot read a picture from {path}: not an image; give a JPEG or a PNG") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"cannot use the picture {path}: {error}; make it smaller") from error
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"cannot read a picture from {path}: it is damaged ({error}); give a whole file") from error


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < _MIN_SIDE:
        raise InputError(
            f"cannot use the picture {path}: {width}x{height} pixels show no face; give at least {_MIN_SIDE} each way"
        )
    if width * height > _MAX_PIXELS:
        raise InputError(
            f"cannot use the picture {path}: {width}x{height} pixels are more than "
            f"{_MAX_PIXELS // 10**6} million; make it smaller"
        )


def _srgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(white, rgba).convert("RGB")
        return _from_profile(flat, image.info.get("icc_profile"))
    return _from_profile(image, image.info.get("icc_profile"))


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
    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if not image.mode.startswith("F") else max(1.0, float(np.nanmax(values)))
    grey = np.clip(np.nan_to_num(values) / top * 255 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
