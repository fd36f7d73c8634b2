"""Serving a decoder changes how it runs, never what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import streamdiff_kernels as kernels
from streamdiff.config import VAEConfig
from streamdiff.errors import ConfigError
from streamdiff.models import tae, vae
from streamdiff.models.served.decoder import ServedDecoder, fuse_norms, pack_weights
from streamdiff.models.tae import TAEConfig, TAEDecoder
from streamdiff.models.vae import CausalConv3d, Conv2d, RMSNorm, VAEDecoder, VideoDecoder
from streamdiff_kernels import Impl


def decoder(which: str) -> VideoDecoder:
    if which == "vae":
        wan = VAEDecoder(VAEConfig(base_dim=8, num_res_blocks=1))
        vae.initialise(wan, seed=0)
        return wan.eval().requires_grad_(False)
    light = TAEDecoder(TAEConfig(widths=(16, 16, 8, 8)))
    tae.initialise(light, seed=0)
    return light.eval().requires_grad_(False)


def agrees(which: str, device: str, *, compile: bool, tolerance: float) -> None:
    """Two chunks, a rewind, and a chunk of another length, against the decoder as it is; on CUDA against one with its
    weights packed and its norms fused too.
    """
    plain = decoder(which).to(device)
    if device == "cuda":
        pack_weights(plain)
    if device == "cuda":
        fuse_norms(plain, Impl.TRITON)
    served = ServedDecoder(decoder(which).to(device), compile=compile)
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn(1, 16, T, 4, 6, generator=generator).to(device) for T in (2, 3, 3, 3, 1)]
    with torch.inference_mode():
        _, expected = plain.decode(chunks[0])
        _, state = served.decode(chunks[0])
        kept = state
        for turn in (chunks[1:3], chunks[3:]):  # The second turn starts from the same kept state.
            after, state = expected, kept
            for chunk in turn:
                wanted, after = plain.decode(chunk, after)
                found, state = served.decode(chunk, state)
                assert state.num_latents == after.num_latents
                assert (found - wanted).abs().max() <= tolerance
                for ours, theirs in zip(state.pasts, after.pasts, strict=True):
                    assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("which", ["vae", "tae"])
def test_on_a_cpu(which: str) -> None:
    agrees(which, "cpu", compile=False, tolerance=0.0)


@pytest.mark.parametrize("which", ["vae", "tae"])
def test_every_convolution_is_laid_out_once(which: str) -> None:
    served = ServedDecoder(decoder(which))
    convolutions = [m for m in served.modules() if isinstance(m, (CausalConv3d, Conv2d))]
    with torch.inference_mode():
        _, state = served.decode(torch.zeros(1, 16, 2, 4, 6))
        weights = [conv.packing and conv.packing._weight for conv in convolutions]
        assert all(weight is not None and weight.is_mkldnn for weight in weights)
        served.decode(torch.zeros(1, 16, 2, 4, 6), state)
    assert all(
        conv.packing is not None and conv.packing._weight is w for conv, w in zip(convolutions, weights, strict=True)
    )


def test_large_decoders_are_not_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamdiff.models.served.decoder.MOST_PACKED_BYTES", 1000)
    served = ServedDecoder(decoder("vae"))
    assert not any(m.packing for m in served.modules() if isinstance(m, (CausalConv3d, Conv2d)))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["vae", "tae"])
def test_compiled(which: str) -> None:
    agrees(which, "cpu", compile=True, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["vae", "tae"])
def test_a_replayed_graph_is_bit_equal_to_eager(which: str) -> None:
    agrees(which, "cuda", compile=False, tolerance=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["vae", "tae"])
def test_a_stream_on_cuda_equals_the_whole(which: str) -> None:
    plain = decoder(which).to("cuda", torch.bfloat16)
    whole = torch.randn(1, 16, 6, 8, 6, device="cuda")
    with torch.inference_mode():
        expected, _ = plain.decode(whole)
        first, state = plain.decode(whole[:, :, :2])
        second, state = plain.decode(whole[:, :, 2:5], state)
        third, _ = plain.decode(whole[:, :, 5:], state)
    assert torch.equal(torch.cat([first, second, third], 2), expected)


class _Calls(TorchDispatchMode):
    """Counts the calls of our fused norm, and of the layouts that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.channels_last: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "streamdiff_kernels":
            self.channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last_3d))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.TORCH])
def test_every_norm_and_activation_is_one_pass_over_packed_pixels(impl: Impl) -> None:
    plain, served = decoder("vae"), ServedDecoder(decoder("vae"), impl=impl)
    pack_weights(plain)
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, after = plain.decode(latents)
        wanted, after = plain.decode(latents, after)
        found, state = served.decode(latents)
        with _Calls() as calls:
            found, state = served.decode(latents, state)
    # The norm of the one attention stands before a projection, not before an activation.
    assert len(calls.channels_last) == 2 * (sum(isinstance(m, RMSNorm) for m in plain.modules()) - 1)
    assert all(calls.channels_last)
    assert (found - wanted).abs().max() <= 2e-5
    for ours, theirs in zip(state.pasts, after.pasts, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * max(1.0, theirs.abs().max().item())


def test_one_pass_rounds_no_more_than_three_did() -> None:
    """In bfloat16, against the same weights in float64."""
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    bfloat16 = [decoder("vae").to(torch.bfloat16) for _ in range(2)]
    exact = decoder("vae").to(torch.bfloat16).double()
    with torch.inference_mode():
        want, _ = exact.decode(latents.to(torch.bfloat16).double())
        errors = [
            float((it.decode(latents.to(torch.bfloat16))[0].double() - want).square().mean().sqrt())
            for it in (ServedDecoder(bfloat16[0], impl=Impl.TORCH), bfloat16[1])
        ]
    assert 0 < errors[0] < errors[1], errors


@pytest.mark.gpu
def test_on_cuda_the_fused_vae_is_the_plain_one() -> None:
    plain, served = decoder("vae").to("cuda"), ServedDecoder(decoder("vae").to("cuda"), graph=False)
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0)).to("cuda")
    with torch.inference_mode():
        assert (served.decode(latents)[0] - plain.decode(latents)[0]).abs().max() <= 1e-4


def test_an_implementation_that_cannot_run_is_named_at_once() -> None:
    pytest.importorskip("triton")
    with pytest.raises(kernels.BackendUnavailable, match=r"Impl\.TRITON cannot run"):
        ServedDecoder(decoder("vae"), impl=Impl.TRITON)


def test_weights_are_packed_and_keep_their_values() -> None:
    plain, served = decoder("vae"), ServedDecoder(decoder("vae")).decoder
    for (name, theirs), ours in zip(plain.named_parameters(), served.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        if ours.dim() == 5:
            assert ours.is_contiguous(memory_format=torch.channels_last_3d)


def test_bad_input_is_still_told() -> None:
    with pytest.raises(ConfigError, match="latents must be"):
        ServedDecoder(decoder("tae")).decode(torch.zeros(1, 3, 1, 4, 4))
