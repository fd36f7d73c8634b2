"""The light decoder streams like the VAE's: any cut gives the same bits, an old state is a snapshot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamdiff.models.tae import TAEConfig, TAEDecoder, initialise
from streamdiff.models.vae import DecoderState

CONFIG = TAEConfig(z_dim=4, widths=(16, 12, 8, 8), num_blocks=2)


def decoder(dtype: torch.dtype = torch.float32) -> TAEDecoder:
    module = TAEDecoder(CONFIG)
    initialise(module, seed=1)
    return module.to(dtype).eval().requires_grad_(False)


def latents(num: int, *, num_streams: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_streams, CONFIG.z_dim, num, 3, 5, generator=generator)


def decoded(module: TAEDecoder, pieces: tuple[Tensor, ...]) -> Tensor:
    state: DecoderState | None = None
    frames: list[Tensor] = []
    for piece in pieces:
        frames_BCTHW, state = module.decode(piece, state)
        frames.append(frames_BCTHW)
    return torch.cat(frames, 2)


@pytest.mark.heavy
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4), num_streams=st.integers(1, 2))
def test_decoding_cut_anywhere(cuts: list[int], num_streams: int) -> None:
    whole = latents(sum(cuts), num_streams=num_streams)
    module = decoder()
    expected, _ = module.decode(whole)
    assert expected.shape == (num_streams, 3, 4 * sum(cuts) - 3, 24, 40)
    assert torch.equal(decoded(module, whole.split(cuts, 2)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    whole = latents(4)
    module = decoder(dtype)
    expected, _ = module.decode(whole)
    assert expected.dtype == dtype
    assert torch.equal(decoded(module, whole.split([1, 3], 2)), expected)


def test_a_stream_goes_back_to_a_kept_state() -> None:
    module = decoder()
    _, kept = module.decode(latents(2))
    before = [past.clone() for past in kept.pasts]
    first, after = module.decode(latents(3, seed=1), kept)
    module.decode(latents(2, seed=2), after)
    again, _ = module.decode(latents(3, seed=1), kept)
    assert torch.equal(first, again)
    assert all(torch.equal(past, copy) for past, copy in zip(kept.pasts, before, strict=True))


def test_a_state_owns_what_it_says_and_no_more() -> None:
    module = decoder()
    state = module.initial_state(latent_h=3, latent_w=5)
    for num_latents in range(3):
        assert state.num_latents == num_latents
        assert state.bytes == sum(past.untyped_storage().nbytes() for past in state.pasts)
        assert state.bytes == module.initial_state(latent_h=3, latent_w=5).bytes
        _, state = module.decode(latents(1), state)


def test_a_frame_reaches_the_next_ones_only() -> None:
    """Causal, and with a memory: a changed latent changes its own frames and later ones, none before."""
    module = decoder()
    one = latents(4)
    two = one.clone()
    two[:, :, 2] += 1.0
    before, changed = module.decode(one)[0] != module.decode(two)[0], 4 * 2 - 3
    assert not before[:, :, :changed].any()
    assert before[:, :, changed : changed + 4].any()
    assert before[:, :, changed + 4 :].any()


def test_random_weights_are_the_same_bits_and_paint_something() -> None:
    module = TAEDecoder(TAEConfig(widths=(32, 16, 16, 16)))
    for seed in range(4):
        initialise(module, seed=seed)
        weights = module.decoder["1"].weight.clone()
        with torch.no_grad():
            frames, _ = module.decode(torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
        assert 0.05 < frames.std() < 0.7
        assert (frames.abs() == 1.0).float().mean() < 0.3
        initialise(module, seed=seed)
        assert torch.equal(module.decoder["1"].weight, weights)
