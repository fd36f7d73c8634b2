"""What one rank sends is what the next one gets, bit for bit, whatever the packet carries."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamdiff.errors import RankFailed
from streamdiff.pipeline import wire
from streamdiff.pipeline.packet import (
    Command,
    Packet,
    RefreshSink,
    ReturnLatent,
    Rewind,
    SetReference,
    SwitchPrompt,
)

DTYPES = list(wire._DTYPES.values())


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern, NaN payloads and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = dtype.itemsize * int(torch.tensor(shape).prod().item())
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=5).map(tuple)
tensors = st.builds(random_bits, shapes, st.sampled_from(DTYPES), st.integers(0, 2**31))
maybe = st.none() | tensors
commands = st.one_of(
    st.builds(SetReference, tensors, maybe),
    st.builds(SwitchPrompt, tensors),
    st.builds(ReturnLatent),
    st.builds(RefreshSink, st.integers(0, 2**40), maybe),
    st.builds(Rewind, st.integers(0, 2**40)),
)
packets = st.builds(
    Packet,
    chunk=st.integers(0, 2**60),
    epoch=st.integers(0, 2**60),
    lead=st.integers(0, 30),
    latent_BCTHW=tensors,
    audio_BZEA=maybe,
    sound_S=maybe,
    frames_THWC=maybe,
    commands=st.lists(commands, max_size=4).map(tuple),
)


def round_trip(packet: Packet) -> Packet:
    message = wire.take_apart(packet)
    payload_S = torch.full((message.num_bytes["cpu"],), 0xA5, dtype=torch.uint8)
    wire.fill_payload(payload_S, message, "cpu")
    return wire.put_together(message.manifest, {"cpu": payload_S})


def assert_same(left: object, right: object) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        left_S, right_S = (x.contiguous().reshape(-1).view(torch.uint8) for x in (left, right))
        assert torch.equal(left_S, right_S)
    elif isinstance(left, tuple):
        assert isinstance(right, tuple)
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    else:
        assert left == right


@given(packets)
def test_every_bit_of_a_packet_arrives(packet: Packet) -> None:
    assert_same(round_trip(packet), packet)


def test_every_command_is_covered_above() -> None:
    assert set(get_args(Command)) == {SetReference, SwitchPrompt, ReturnLatent, RefreshSink, Rewind}


def test_a_strided_tensor_arrives_dense() -> None:
    latent = torch.arange(24.0).view(1, 2, 3, 2, 2).transpose(3, 4)[:, :, ::2]
    arrived = round_trip(Packet(chunk=0, epoch=0, lead=0, latent_BCTHW=latent)).latent_BCTHW
    assert arrived.is_contiguous()
    assert torch.equal(arrived, latent)


def test_a_header_keeps_its_numbers_and_refuses_strangers() -> None:
    header = wire.Header(
        wire.Kind.PACKET, seq=7, epoch=-1, chunk=2**62, manifest_bytes=9, cpu_bytes=2**40, cuda_bytes=3
    )
    assert len(header.pack()) == wire.HEADER.size == 64
    assert wire.Header.unpack(header.pack()) == header
    with pytest.raises(RankFailed, match="same streamdiff"):
        wire.Header.unpack(b"HTTP" + header.pack()[4:])


def test_an_unknown_command_is_refused() -> None:
    message = wire.take_apart(Packet(chunk=0, epoch=0, lead=0, latent_BCTHW=torch.zeros(1), commands=(Rewind(0),)))
    with pytest.raises(RankFailed, match="same streamdiff"):
        wire.put_together(message.manifest.replace(b"Rewind", b"Reboot"), {"cpu": torch.zeros(64).byte()})


def test_a_dtype_that_no_packet_carries_is_named() -> None:
    with pytest.raises(ValueError, match="complex128"):
        wire.take_apart(Packet(chunk=0, epoch=0, lead=0, latent_BCTHW=torch.zeros(1, dtype=torch.complex128)))
