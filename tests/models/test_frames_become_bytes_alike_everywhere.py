"""Frames become bytes by rounding, with what lies outside at the ends of the range, in any layout."""

from __future__ import annotations

import pytest
import torch

from streamdiff.models.vae import to_rgb8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_every_byte_is_the_nearest_level(dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    frames_BCTHW = (2.4 * torch.rand((2, 3, 2, 6, 10), generator=generator) - 1.2).to(dtype)
    frames_BCTHW = frames_BCTHW.contiguous(memory_format=layout)
    kept = frames_BCTHW.clone()
    found_BTHWC = to_rgb8(frames_BCTHW)
    assert found_BTHWC.is_contiguous()
    assert found_BTHWC.shape == (2, 2, 6, 10, 3)
    assert torch.equal(frames_BCTHW, kept), "the frames are left alone"
    exact_BTHWC = (frames_BCTHW.movedim(1, -1).double() + 1) * 127.5
    error = (found_BTHWC.double() - exact_BTHWC.clamp(0, 255)).abs()
    assert error.max() <= 0.5 + 1e-4
