"""Snapshots in memory that outlives a process: whole at any moment, only what is new is copied, the layout is kept."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamdiff.errors import StreamdiffError
from streamdiff.pipeline.album import Album, shared_memory


def filled(value: int, size: int) -> Tensor:
    return torch.full((size,), float(value))


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.dictionaries(st.integers(0, 30), st.integers(1, 3000), min_size=0, max_size=5)
        ),
        max_size=20,
    )
)
def test_what_was_told_is_whole_until_the_next_is_told(moves: list[tuple[str, dict[int, int]]]) -> None:
    """A reader that knows what was told before a `replace` reads the old tensors after it, and one that knows what was
    told after it the new ones.
    """
    album = Album(shared_memory())
    told: dict[str, dict[str, object]] = {}
    truth: dict[str, dict[str, Tensor]] = {}
    for step, (owner, sizes) in enumerate(moves):
        tensors = {f"{step}/{name}": filled(step * 100 + name, size) for name, size in sizes.items()}
        tensors |= {name: tensor for name, tensor in truth.get(owner, {}).items() if int(name[-1]) % 2}
        album.replace({owner: tensors})
        assert_reads(album, told, truth)
        truth[owner] = tensors
        told = {name: album.where(name) for name in truth}
        assert_reads(album, told, truth)
    album.close()


def assert_reads(album: Album, told: dict[str, dict[str, object]], truth: dict[str, dict[str, Tensor]]) -> None:
    reader = Album(os.dup(album._fd), told)
    for owner, tensors in truth.items():
        found = reader.load(owner)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    reader.close()


def test_only_new_names_are_copied_and_room_is_used_again() -> None:
    album = Album(shared_memory())
    for chunk in range(500):
        window = {str(c): filled(c, 1000) for c in range(max(0, chunk - 3), chunk + 1)}
        assert album.replace({"seat": window, "log": {str(chunk): filled(chunk, 50)}}) == 4000 + 200
    assert os.fstat(album._fd).st_size <= 4096 * 2 * 6
    successor = Album(os.dup(album._fd), {owner: album.where(owner) for owner in ("seat", "log")})
    for chunk in range(500, 1000):
        window = {str(c): filled(c, 1000) for c in range(chunk - 3, chunk + 1)}
        successor.replace({"seat": window, "log": {str(chunk): filled(chunk, 50)}})
    assert torch.equal(successor.load("seat")["998"], filled(998, 1000))
    assert os.fstat(album._fd).st_size <= 4096 * 2 * 6
    album.close()
    successor.close()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4, 5),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(1, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
        torch.randn(4, 6, 5)[:, 2:4],
        torch.randn(3, 4).bfloat16(),
        torch.randn(3, 4).to(torch.float8_e4m3fn),
        torch.tensor(float("nan")),
        torch.empty(0, 3),
        torch.arange(5),
    ],
    ids=["plain", "channels last", "channels last 3d", "a view", "bf16", "fp8", "a number", "nothing", "integers"],
)
def test_a_tensor_comes_back_as_it_was(tensor: Tensor) -> None:
    album = Album(shared_memory())
    album.replace({"seat": {"other": torch.ones(7), "it": tensor}})
    found = album.load("seat")["it"]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    # Dense ones keep their layout: a convolution may sum in another order for another one.
    assert found.stride() == torch.empty_like(tensor).stride()
    album.close()


def test_memory_that_takes_no_more_says_so() -> None:
    read, write = os.pipe()
    os.close(read)
    album = Album(write)
    with pytest.raises(StreamdiffError, match="no room for a snapshot"):
        album.replace({"seat": {"it": torch.ones(4)}})
    album.close()
    album.close()
