"""What a rewind takes back is as if it had never been, bit for bit; slots may stand in any order."""

from __future__ import annotations

import pytest
import torch

from streamdiff.memory import SinkMemory, StepMemory
from streamdiff.models.dit import attend
from streamdiff.rope import grid_rotation, rotate

Z, N, K, L, S = 2, 2, 8, 3, 4


def new_memory(window: int, slack: int) -> StepMemory:
    sink = SinkMemory(
        num_layers=Z,
        num_streams=1,
        moving_tokens=S,
        num_heads=N,
        head_dim=K,
        dtype=torch.float32,
        device="cpu",
    )
    for layer in range(Z):
        sink.write(layer, torch.full((1, S, N, K), -1.0), torch.full((1, S, N, K), -2.0))
    memory = StepMemory(sink, chunk_tokens=L, window_chunks=window, slack_chunks=slack)
    memory.keys_ZBMNK.fill_(float("nan"))  # unwritten slots must never be seen
    memory.values_ZBMNK.fill_(float("nan"))
    memory.take_sink(None)
    memory.turn_sink(grid_rotation([0], [0], range(S), (2, 1, 1)))
    return memory


def push(memory: StepMemory, chunk: int, flavour: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Write recognisable keys and values; return all that the chunk can see."""
    seen = []
    for layer, view in enumerate(memory.views(memory.admit(chunk))):
        view.own_keys_BLNK.fill_(100 * layer + chunk + flavour)
        view.own_values_BLNK.fill_(-(100 * layer + chunk + flavour))
        seen.append((view.keys_BMNK.clone(), view.values_BMNK.clone()))
    return torch.cat([k for k, _ in seen]), torch.cat([v for _, v in seen])


def test_made_again_a_chunk_sees_what_it_saw() -> None:
    for window in (1, 2, 3, 4):
        for slack in (1, 2, 5):
            for back in range(1, slack + 2):
                memory, record = new_memory(window, slack), {}
                for chunk in range(12):
                    record[chunk] = push(memory, chunk)
                memory.rewind(12 - back)
                for chunk in range(12 - back, 14):
                    seen = push(memory, chunk)
                    assert not seen[0].isnan().any()
                    assert chunk not in record or all(
                        torch.equal(a, b) for a, b in zip(seen, record[chunk], strict=True)
                    )


def test_what_was_taken_back_leaves_no_trace() -> None:
    memory = new_memory(3, 4)
    for chunk in range(9):
        push(memory, chunk)
    memory.rewind(6)
    for chunk in range(6, 20):
        keys, _ = push(memory, chunk, flavour=0.5)
        old_epoch = {float(c) for c in range(6, 9)}
        assert old_epoch.isdisjoint(keys[0, S:, 0, 0].tolist())


def test_addresses_are_fixed() -> None:
    memory = new_memory(3, 2)
    address = memory.keys_ZBMNK.data_ptr()
    for chunk in range(10):
        assert memory.views(memory.admit(chunk))[0].keys_BMNK.data_ptr() == address
    memory.rewind(8)
    assert memory.keys_ZBMNK.data_ptr() == address


@pytest.mark.heavy
def test_slot_order_does_not_matter() -> None:
    """Absolute keys in ring order equal window-relative keys in time order, over a long bfloat16 stream."""
    generator = torch.Generator().manual_seed(0)
    window, pairs, L1, worst = 4, (6, 5, 5), 6, 0.0
    history: list[tuple[torch.Tensor, torch.Tensor]] = []
    ring_k = torch.zeros(1, window * L1, 2, 32, dtype=torch.bfloat16)
    ring_v = torch.zeros_like(ring_k)
    for chunk in range(2000):
        q, k, v = torch.randn(3, 1, L1, 2, 32, generator=generator).to(torch.bfloat16).unbind(0)
        history = [*history[-(window - 1) :], (k, v)]
        slot = slice(chunk % window * L1, (chunk % window + 1) * L1)
        here = grid_rotation([chunk], range(2), range(3), pairs)
        ring_k[:, slot], ring_v[:, slot] = rotate(k, here), v
        if chunk % 50 and chunk > 10:
            continue
        seen = min(chunk + 1, window) * L1
        ours = attend(rotate(q, here), ring_k[:, :seen], ring_v[:, :seen]).float()
        relative = [
            rotate(key.double().float(), grid_rotation([i], range(2), range(3), pairs))
            for i, (key, _) in enumerate(history)
        ]
        now = grid_rotation([len(history) - 1], range(2), range(3), pairs)
        reference = attend(
            rotate(q.float(), now),
            torch.cat(relative, 1),
            torch.cat([value.float() for _, value in history], 1),
        )
        worst = max(worst, (ours - reference).abs().max().item() / reference.abs().max().item())
    assert worst < 1e-2
