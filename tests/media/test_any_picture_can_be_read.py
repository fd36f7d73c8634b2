"""Every kind of picture arrives upright, opaque, RGB and of the size asked for; what cannot says why."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from streamdiff.errors import ConfigError, InputError
from streamdiff.media import contact_sheet, picture, read_image


def _quadrants(height: int = 120, width: int = 160) -> Image.Image:
    """Red, green over blue, white: a picture that shows how it lies."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (250, 10, 10)
    pixels[: height // 2, width // 2 :] = (10, 250, 10)
    pixels[height // 2 :, : width // 2] = (10, 10, 250)
    pixels[height // 2 :, width // 2 :] = (250, 250, 250)
    return Image.fromarray(pixels)


def _corners(image_HWC: torch.Tensor) -> list[str]:
    names = {(True, False, False): "red", (False, True, False): "green", (False, False, True): "blue"}
    H, W, _ = image_HWC.shape
    spots = [(H // 4, W // 4), (H // 4, 3 * W // 4), (3 * H // 4, W // 4), (3 * H // 4, 3 * W // 4)]
    bright = [tuple(bool(value > 128) for value in image_HWC[y, x]) for y, x in spots]
    return [names.get(colour, "white" if all(colour) else "black") for colour in bright]  # type: ignore[arg-type]


UPRIGHT = ["red", "green", "blue", "white"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tiff"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"face{suffix}"
    _quadrants().save(path)
    image_HWC = read_image(path, 64, 96)
    assert image_HWC.dtype == torch.uint8
    assert image_HWC.shape == (64, 96, 3)
    assert _corners(image_HWC) == UPRIGHT


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(tmp_path: Path, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = _quadrants()
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "face.jpg", exif=exif, quality=95)
    assert _corners(read_image(tmp_path / "face.jpg", 120, 160)) == UPRIGHT


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "RGBA", "HSV"])
def test_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("face.tiff" if mode in ("CMYK", "HSV") else "face.png")
    if mode == "HSV":
        _quadrants().convert("RGB").save(path)
    else:
        _quadrants().convert(mode).save(path)
    image_HWC = read_image(path, 64, 96)
    assert image_HWC.shape == (64, 96, 3)
    if mode in ("P", "CMYK", "RGBA", "HSV"):
        assert _corners(image_HWC) == UPRIGHT
    else:
        assert _corners(image_HWC)[3] == "white"


def test_transparency_becomes_white(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, 32:] = (200, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    image_HWC = read_image(tmp_path / "face.png", 64, 64)
    assert image_HWC[32, 8].tolist() == [255, 255, 255]
    assert image_HWC[32, 56].tolist() == [200, 0, 0]


def test_a_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    image = _quadrants().quantize(4)
    image.info["transparency"] = image.getpixel((10, 10))
    image.save(tmp_path / "face.png", transparency=image.getpixel((10, 10)))
    assert _corners(read_image(tmp_path / "face.png", 64, 96)) == ["white", "green", "blue", "white"]


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "face.png")
    grey_W = read_image(tmp_path / "face.png", 64, 256)[32, :, 0]
    assert torch.equal(grey_W, torch.arange(256, dtype=torch.uint8))


def test_a_colour_profile_is_converted(tmp_path: Path) -> None:
    """Pure red of a profile with linear tone curves is not mid-grey of sRGB."""
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    grey.save(tmp_path / "same.png", icc_profile=lab.tobytes())
    assert read_image(tmp_path / "same.png", 64, 64)[0, 0].tolist() == [128, 128, 128]
    grey.save(tmp_path / "broken.png", icc_profile=b"not a profile")
    assert read_image(tmp_path / "broken.png", 64, 64)[0, 0].tolist() == [128, 128, 128]


def test_the_cut_is_around_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((64, 192, 3), dtype=np.uint8)
    pixels[:, 64:128] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert bool((read_image(tmp_path / "wide.png", 64, 64) == 255).all())


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    shrunk = read_image(tmp_path / "board.png", 64, 64).float()
    assert float((shrunk - 127.5).abs().max()) < 2


def test_what_is_not_a_picture_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / "none.png", 64, 64)
    with pytest.raises(InputError, match="not a file"):
        read_image(tmp_path, 64, 64)
    for name in ("text.png", "empty.png"):
        with pytest.raises(InputError, match="not an image"):
            read_image(tmp_path / name, 64, 64)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_a_truncated_picture_says_so(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"face{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(InputError, match=r"damaged|not an image"):
        read_image(path, 64, 64)


@pytest.mark.heavy
def test_impossible_sizes_say_so(tmp_path: Path) -> None:
    Image.new("RGB", (31, 300)).save(tmp_path / "tiny.png")
    with pytest.raises(InputError, match="31x300 pixels show no face"):
        read_image(tmp_path / "tiny.png", 64, 64)
    for side in (11_000, 20_000):
        Image.new("1", (side, side)).save(tmp_path / "huge.png")
        with pytest.raises(InputError, match="make it smaller"):
            read_image(tmp_path / "huge.png", 64, 64)
    with pytest.raises(ConfigError, match="positive size"):
        read_image(tmp_path / "tiny.png", 0, 64)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX", "ICO"])
def test_other_formats_are_not_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS would start Ghostscript."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    _quadrants().save(tmp_path / "face.png", kind)
    with pytest.raises(InputError, match="not an image"):
        read_image(tmp_path / "face.png", 64, 64)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_are_finite(tmp_path: Path, value: float) -> None:
    values = np.full((64, 64), 0.5, np.float32)
    Image.fromarray(values).save(tmp_path / "face.tiff")
    assert read_image(tmp_path / "face.tiff", 64, 64)[0, 0].tolist() == [128, 128, 128]
    values[5, 7] = value
    Image.fromarray(values).save(tmp_path / "face.tiff")
    with pytest.raises(InputError, match="not finite"):
        read_image(tmp_path / "face.tiff", 64, 64)


def test_a_jpeg_of_endless_scans_is_not_decoded(tmp_path: Path) -> None:
    out = io.BytesIO()
    _quadrants().save(out, "JPEG", progressive=True)
    data = out.getvalue()
    (tmp_path / "face.jpg").write_bytes(data)
    assert _corners(read_image(tmp_path / "face.jpg", 64, 96)) == UPRIGHT
    last = data.rindex(b"\xff\xda")
    (tmp_path / "face.jpg").write_bytes(data[:last] + data[last:-2] * 200 + b"\xff\xd9")
    with pytest.raises(InputError, match="100 scans"):
        read_image(tmp_path / "face.jpg", 64, 64)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "face.png")
    with pytest.raises(InputError, match="not a file"):
        read_image(tmp_path / "face.png", 64, 64)


def test_a_large_picture_keeps_its_place_and_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "_MANY_PIXELS", 10_000)
    exif = Image.Exif()
    exif[0x0112] = 3
    large = _quadrants().transpose(Image.Transpose.ROTATE_180)
    large.save(tmp_path / "face.jpg", exif=exif)
    assert _corners(read_image(tmp_path / "face.jpg", 120, 160)) == UPRIGHT


def test_every_message_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    for name in ("none.png", "text.png"):
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / name, 64, 64)
        assert "\n" not in str(caught.value)


def test_a_contact_sheet_shows_every_frame_in_order(tmp_path: Path) -> None:
    frames_THWC = torch.stack([torch.full((16, 24, 3), 40 * i, dtype=torch.uint8) for i in range(5)])
    contact_sheet(frames_THWC, tmp_path / "sheet.png", columns=3, gap=2)
    sheet_HWC = torch.from_numpy(np.array(Image.open(tmp_path / "sheet.png")))
    assert sheet_HWC.shape == (2 * 16 + 2, 3 * 24 + 2 * 2, 3)
    for i in range(5):
        top, left = i // 3 * 18, i % 3 * 26
        assert torch.equal(sheet_HWC[top : top + 16, left : left + 24], frames_THWC[i])
    assert bool((sheet_HWC[18:, 52:] == 255).all())
    with pytest.raises(ConfigError, match="contact sheet"):
        contact_sheet(frames_THWC.float(), tmp_path / "sheet.png")
    with pytest.raises(InputError, match="cannot write"):
        contact_sheet(frames_THWC, tmp_path / "nowhere" / "sheet.png")
