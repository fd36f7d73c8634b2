"""One graph serves the whole stream: the slot, the fill level and the sparse segments move on the device."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code

import streamdiff_kernels as sk
from streamdiff_kernels import Impl

L, N, K, G, SLOTS, T = 6, 2, 8, 4, 3, 2
D = N * K


class Block(torch.nn.Module):
    """Attention and a branch, as a DiT layer calls them."""

    def __init__(self, impl: Impl, backend: str, sparse: bool) -> None:
        super().__init__()
        self.impl, self.backend, self.sparse = impl, backend, sparse
        self.qkv = torch.nn.Linear(D, 3 * D)
        self.out = torch.nn.Linear(D, D)
        for name in ("q_weight", "k_weight"):
            self.register_buffer(name, torch.rand(D))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(G + SLOTS * L, N, K))

    def forward(
        self,
        x: Tensor,
        mods: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot: Tensor,
        length: Tensor,
        segments: Tensor,
    ) -> Tensor:
        normed = sk.norm_modulate(x, mods[:, 0], mods[:, 1], impl=self.impl)
        q, k, v = self.qkv(normed).split(D, dim=-1)
        q, q_sink = sk.qk_norm_rope_write(
            q,
            k,
            v,
            q_weight_D=self.q_weight,
            k_weight_D=self.k_weight,
            cos_LR=cos,
            sin_LR=sin,
            cos_sink_LR=cos,
            sin_sink_LR=sin,
            keys_BMNK=self.keys,
            values_BMNK=self.values,
            slot=slot,
            ring_start=G,
            impl=self.impl,
        )
        seen = sk.attend(
            q,
            self.keys,
            self.values,
            None if self.sparse else length,
            segments=segments if self.sparse else None,
            q_sink_BLNK=q_sink,
            sink_rows=G,
            backend=self.backend,
        )
        x = x.clone()
        return x + sk.gate_residual_norm_modulate_(
            x, self.out(seen.flatten(2)), mods[:, 2], mods[:, 0], mods[:, 1], impl=self.impl
        )


@pytest.mark.heavy
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("impl", "backend"), [(Impl.REFERENCE, "reference"), (Impl.TORCH, "sdpa")])
def test_a_hundred_chunks_are_one_graph(impl: Impl, backend: str, sparse: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Block(impl, backend, sparse).eval()
    eager.keys.normal_()
    twin = Block(impl, backend, sparse).eval()
    twin.load_state_dict(eager.state_dict())
    counter = CompileCounter()
    compiled = torch.compile(twin, backend=counter, fullgraph=True)
    draw = torch.Generator().manual_seed(1)
    slot, length = torch.zeros((), dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    segments = torch.zeros(3, 2, dtype=torch.int32)
    with torch.no_grad():
        for chunk in range(100):
            now = chunk % SLOTS
            slot.fill_(now)
            length.fill_(G + L * min(chunk + 1, SLOTS))
            before = (chunk - 1) % SLOTS if chunk else now
            segments.copy_(torch.tensor([[0, G], [G + now * L, L], [G + before * L, L if chunk else 0]]))
            x = torch.randn(1, L, D, generator=draw)
            mods = torch.randn(T, 3, D, generator=draw)
            angle = torch.randn(L, K // 2, generator=draw)
            inputs = (x, mods, angle.cos(), angle.sin(), slot, length, segments)
            assert torch.equal(compiled(*inputs), eager(*inputs))
    assert counter.frame_count == 1
    assert torch.equal(twin.keys, eager.keys)


@pytest.mark.slow
def test_inductor_writes_the_ring_in_place() -> None:
    """The compiled block touches one slot of the ring and copies none of it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(Impl.TORCH, "sdpa", sparse=False).eval()
    twin = Block(Impl.TORCH, "sdpa", sparse=False).eval()
    twin.load_state_dict(block.state_dict())
    compiled = torch.compile(twin, fullgraph=True)
    angle = torch.randn(L, K // 2)
    length = torch.full((), G + L, dtype=torch.int32)
    segments = torch.zeros(1, 2, dtype=torch.int32)
    ring_was_copied: list[bool] = []
    with torch.no_grad():
        for number in (0, 2, 1):
            slot = torch.full((), number, dtype=torch.int32)
            x, mods = torch.randn(1, L, D), torch.randn(T, 3, D)
            inputs = (x, mods, angle.cos(), angle.sin(), slot, length, segments)
            if not ring_was_copied:
                got, code = run_and_get_code(compiled, *inputs)
                ring_was_copied = [f"empty_strided_cpu(({G + SLOTS * L}, {N}, {K})" in text for text in code]
            else:
                got = compiled(*inputs)
            torch.testing.assert_close(got, block(*inputs))
            torch.testing.assert_close(twin.keys, block.keys)
    assert ring_was_copied == [False]
