"""A stream cut anywhere gives the same bits as the whole, and an old state is a snapshot to go back to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamdiff.config import VAEConfig
from streamdiff.models.vae import DecoderState, EncoderState, VAEDecoder, VAEEncoder, initialise

CONFIG = VAEConfig(
    base_dim=6, num_res_blocks=1, z_dim=4, latent_mean=(0.1, -0.2, 0.3, 0.0), latent_std=(1.0, 2.0, 0.5, 1.5)
)


def decoder(dtype: torch.dtype = torch.float32) -> VAEDecoder:
    module = VAEDecoder(CONFIG)
    initialise(module, seed=1)
    return module.to(dtype).eval().requires_grad_(False)


def encoder(dtype: torch.dtype = torch.float32) -> VAEEncoder:
    module = VAEEncoder(CONFIG)
    initialise(module, seed=2)
    return module.to(dtype).eval().requires_grad_(False)


def latents(num: int, *, num_streams: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_streams, CONFIG.z_dim, num, 3, 5, generator=generator)


def video(num: int, *, num_streams: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_streams, 3, num, 24, 40, generator=generator) * 2 - 1


def decoded(module: VAEDecoder, pieces: tuple[Tensor, ...], state: DecoderState | None = None) -> Tensor:
    frames: list[Tensor] = []
    for piece in pieces:
        frames_BCTHW, state = module.decode(piece, state)
        frames.append(frames_BCTHW)
    return torch.cat(frames, 2)


def encoded(module: VAEEncoder, pieces: tuple[Tensor, ...], state: EncoderState | None = None) -> Tensor:
    found: list[Tensor] = []
    for piece in pieces:
        latents_BCTHW, state = module.encode(piece, state)
        found.append(latents_BCTHW)
    return torch.cat(found, 2)


@pytest.mark.heavy
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4), num_streams=st.integers(1, 2))
def test_decoding_cut_anywhere(cuts: list[int], num_streams: int) -> None:
    whole = latents(sum(cuts), num_streams=num_streams)
    module = decoder()
    expected, _ = module.decode(whole)
    assert expected.shape == (num_streams, 3, 4 * sum(cuts) - 3, 24, 40)
    assert torch.equal(decoded(module, whole.split(cuts, 2)), expected)


@pytest.mark.heavy
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 6), min_size=1, max_size=4), num_streams=st.integers(1, 2))
def test_encoding_cut_anywhere(cuts: list[int], num_streams: int) -> None:
    whole = video(sum(cuts), num_streams=num_streams)
    module = encoder()
    expected, _ = module.encode(whole)
    assert expected.shape[2] == (0 if sum(cuts) == 0 else 1 + (sum(cuts) - 1) // 4)
    assert torch.equal(encoded(module, whole.split(cuts, 2)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    whole = latents(4)
    module = decoder(dtype)
    expected, state = module.decode(whole)
    assert expected.dtype == dtype
    assert all(past.dtype == dtype for past in state.pasts)
    assert torch.equal(decoded(module, whole.split([1, 3], 2)), expected)


def test_the_memory_layout_of_the_input_does_not_matter() -> None:
    whole = latents(3, num_streams=2)
    expected, _ = decoder().decode(whole)
    for other in (
        whole.contiguous(memory_format=torch.channels_last_3d),
        whole.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert other.stride() != whole.stride()
        assert torch.equal(decoder().decode(other)[0], expected)


def test_a_stream_goes_back_to_a_kept_state() -> None:
    module = decoder()
    _, kept = module.decode(latents(2))
    before = [past.clone() for past in kept.pasts]
    first, after = module.decode(latents(3, seed=1), kept)
    module.decode(latents(2, seed=2), after)
    again, _ = module.decode(latents(3, seed=1), kept)
    assert torch.equal(first, again)
    assert kept.num_latents == 2
    assert all(torch.equal(past, copy) for past, copy in zip(kept.pasts, before, strict=True))


def test_an_encoded_stream_goes_back_to_a_kept_state() -> None:
    module = encoder()
    _, kept = module.encode(video(7))
    before = [tensor.clone() for tensor in (kept.waiting_BCTHW, *kept.pasts)]
    first, after = module.encode(video(9, seed=1), kept)
    module.encode(video(5, seed=2), after)
    again, _ = module.encode(video(9, seed=1), kept)
    assert torch.equal(first, again)
    assert kept.waiting_BCTHW.shape[2] == 2
    assert all(
        torch.equal(tensor, copy) for tensor, copy in zip((kept.waiting_BCTHW, *kept.pasts), before, strict=True)
    )


def test_a_state_owns_what_it_says_and_no_more() -> None:
    """A past that is a view would keep the whole activation alive behind it."""
    module = decoder()
    state = module.initial_state(latent_h=3, latent_w=5)
    for num_latents in range(3):
        assert state.num_latents == num_latents
        assert state.bytes == sum(past.untyped_storage().nbytes() for past in state.pasts)
        assert state.bytes == module.initial_state(latent_h=3, latent_w=5).bytes
        _, state = module.decode(latents(1), state)


def test_the_input_may_be_overwritten_after_the_call() -> None:
    module = encoder()
    frames, later = video(3), video(4, seed=1)
    _, state = module.encode(frames)
    expected, _ = module.encode(later, state)
    frames.fill_(torch.nan)
    assert torch.equal(module.encode(later, state)[0], expected)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.heavy
def test_a_still_of_any_length_costs_one_photograph() -> None:
    photo = video(1)
    module = encoder()
    sizes: list[int] = []
    for num_frames in (9, 73):
        with _Largest() as largest:
            still, _ = module.encode(photo.expand(-1, -1, num_frames, -1, -1))
        sizes.append(largest.bytes)
    assert still.shape[2] == 19
    assert sizes[0] == sizes[1]
    assert torch.equal(still, encoded(module, (photo,) * 73))


def test_random_weights_are_the_same_bits_and_paint_something() -> None:
    one, two = decoder(), decoder()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    other = VAEDecoder(CONFIG)
    initialise(other, seed=9)
    assert not torch.equal(other.conv2.weight, one.conv2.weight)
    frames, _ = one.decode(latents(4))
    assert 0.1 < frames.std() < 0.7
    assert (frames.abs() == 1.0).float().mean() < 0.2
