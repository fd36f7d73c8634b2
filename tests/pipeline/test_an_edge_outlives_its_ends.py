"""An edge between processes loses nothing, doubles nothing and keeps the order, whatever is replaced at its ends."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff.errors import RankFailed
from streamdiff.pipeline.edges import Channel, Entry, Inbox, Outbox, Sealed, What, seal
from streamdiff.pipeline.packet import Packet, Rewind, SwitchPrompt

WAIT_S = 60.0
DEPTH = 3


class _TooLateError(Exception):
    pass


class Patience:
    """A check that gives up in the end."""

    def __init__(self) -> None:
        self._until_s = time.monotonic() + WAIT_S

    def __call__(self) -> None:
        if time.monotonic() > self._until_s:
            raise _TooLateError


def sealed(number: int) -> Sealed:
    packet = Packet(
        chunk=number, epoch=0, lead=1, latent_BCTHW=torch.full((1, 2, 1, 40, 40), float(number)), commands=(Rewind(3),)
    )
    return seal(Entry(number=number, seat=number % 3, what=What.PACKET, packet=packet))


def connected(outbox: Outbox, inbox: Inbox) -> None:
    out, into = socket.socketpair()
    outbox.connect(out)
    inbox.connect(into)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["take", "settle", "cut", "sender", "receiver"]), max_size=25))
def test_every_entry_comes_once_and_in_order(moves: list[str]) -> None:
    """Between takes the connection is cut, the sender is replaced by one that has what was kept, or the receiver by one
    that knows what was settled.
    """
    total, check = 40, Patience()
    outbox, inbox = Outbox(DEPTH), Inbox()
    connected(outbox, inbox)
    put, taken, settled = 0, -1, -1
    for move in [*moves, *["take", "settle"] * total]:
        while put < total and len(outbox.kept()) < DEPTH:
            outbox.put(sealed(put), check)
            put += 1
        match move:
            case "take" if taken < put - 1 and taken < settled + DEPTH:
                entry = inbox.get(check).open()
                assert entry.number == taken + 1
                assert entry.packet is not None
                assert torch.equal(entry.packet.latent_BCTHW, torch.full((1, 2, 1, 40, 40), float(entry.number)))
                taken += 1
            case "settle" if settled < taken:
                settled += 1
                inbox.settle(settled)
                while outbox.kept() and outbox.kept()[0].number <= settled:
                    check()
                    time.sleep(0.001)
            case "cut":
                connected(outbox, inbox)
            case "sender":
                log = outbox.kept()
                outbox.close()
                outbox = Outbox(DEPTH, log)
                connected(outbox, inbox)
            case "receiver":
                inbox.close()
                inbox, taken = Inbox(settled), settled
                connected(outbox, inbox)
            case _:
                pass
    assert taken == total - 1
    outbox.close()
    inbox.close()


def test_a_sender_waits_while_so_many_entries_are_not_settled() -> None:
    outbox, inbox, check = Outbox(DEPTH), Inbox(), Patience()
    connected(outbox, inbox)
    for number in range(DEPTH):
        outbox.put(sealed(number), check)
    late = threading.Thread(target=outbox.put, args=(sealed(DEPTH), check), daemon=True)
    late.start()
    for number in range(DEPTH):
        assert inbox.get(check).number == number
    assert [entry.number for entry in outbox.kept()] == [0, 1, 2]
    inbox.settle(0)
    assert inbox.get(check).number == DEPTH
    late.join(WAIT_S)
    outbox.close()
    inbox.close()


def test_an_entry_arrives_whole() -> None:
    packet = Packet(
        chunk=5,
        epoch=2,
        lead=4,
        latent_BCTHW=torch.randn(1, 2, 3, 4, 5),
        sound_S=torch.randn(7),
        frames_THWC=torch.randint(0, 255, (2, 3, 4, 3), dtype=torch.uint8),
        commands=(SwitchPrompt(torch.randn(1, 2, 3).bfloat16()),),
    )
    sent = Entry(number=9, seat=3, what=What.PACKET, key=(11, 12), packet=packet)
    found = seal(sent).open()
    assert (found.number, found.seat, found.what, found.key) == (9, 3, What.PACKET, (11, 12))
    assert found.packet is not None
    assert found.packet.frames_THWC is not None
    assert torch.equal(found.packet.latent_BCTHW, packet.latent_BCTHW)
    assert packet.frames_THWC is not None
    assert torch.equal(found.packet.frames_THWC, packet.frames_THWC)
    (switch,) = found.packet.commands
    assert isinstance(switch, SwitchPrompt)
    (prompt,) = packet.commands
    assert isinstance(prompt, SwitchPrompt)
    assert torch.equal(switch.text_BPC, prompt.text_BPC)
    failed = seal(Entry(number=1, seat=0, what=What.FAILED, rank=2, why="it broke")).open()
    assert (failed.what, failed.rank, failed.why, failed.packet) == (What.FAILED, 2, "it broke", None)


@pytest.mark.parametrize("words", [b"", b"{}", b"[1]", b'{"seat": 1, "what": "nothing", "key": null, "rank": 0}'])
def test_what_another_version_wrote_is_refused(words: bytes) -> None:
    with pytest.raises(RankFailed, match="cannot read an entry"):
        Sealed(0, words, torch.empty(0, dtype=torch.uint8)).open()


def test_words_and_descriptors_arrive_together_and_an_end_is_heard() -> None:
    ours, theirs = socket.socketpair()
    here, there = Channel(ours), Channel(theirs)
    one, other = socket.socketpair()
    here.say({"do": "nothing", "text": "x" * 50_000})
    here.say({"do": "inlet"}, one.fileno())
    one.close()
    assert there.hear() == ({"do": "nothing", "text": "x" * 50_000}, None)
    words, fd = there.hear()
    assert words == {"do": "inlet"}
    assert fd is not None
    with socket.socket(fileno=fd) as received:
        received.sendall(b"hello")
    with other:
        assert other.recv(5) == b"hello"
    here.close()
    with pytest.raises(OSError, match="ended"):
        there.hear()
    here.release()
    there.release()
