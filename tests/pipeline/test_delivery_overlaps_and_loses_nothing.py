"""What is put is delivered once, in order, while the next is made; what goes wrong there comes back here."""

from __future__ import annotations

import threading
import time

import pytest

from streamdiff.errors import InputError, StreamdiffError
from streamdiff.pipeline.delivery import Delivery

WAIT_S = 10.0


def put_all(delivery: Delivery[int], count: int, *, then: BaseException | None = None) -> None:
    """Puts numbers into an open delivery until it refuses one, all are in, or ``then`` is raised."""
    end_s = time.monotonic() + WAIT_S
    with delivery:
        for number in range(count):
            delivery.put(number)
            assert time.monotonic() < end_s
        if then is not None:
            raise then


def test_everything_arrives_in_order_before_the_block_ends() -> None:
    arrived: list[int] = []

    def slow(number: int) -> None:
        time.sleep(0.002)
        arrived.append(number)

    delivery = Delivery(slow, depth=2, patience_s=WAIT_S)
    put_all(delivery, 50)
    assert arrived == list(range(50))
    assert delivery.is_over


def test_the_next_is_made_meanwhile_and_no_more_than_fits() -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def held(_: int) -> None:
        begun.release()
        assert go_on.acquire(timeout=WAIT_S)

    with Delivery(held, depth=2, patience_s=WAIT_S) as delivery:
        delivery.put(0)
        assert begun.acquire(timeout=WAIT_S)
        # The first is being delivered: two more find room without its end, the fourth does not.
        delivery.put(1)
        delivery.put(2)
        fourth = threading.Thread(target=delivery.put, args=(3,))
        fourth.start()
        fourth.join(0.2)
        assert fourth.is_alive()
        for _ in range(4):
            go_on.release()
        fourth.join(WAIT_S)
        assert not fourth.is_alive()


def test_an_error_comes_back_to_who_puts_and_nothing_follows_it() -> None:
    arrived: list[int] = []

    def full(number: int) -> None:
        if number == 2:
            raise InputError("the disk is full; free some of it")
        arrived.append(number)

    with pytest.raises(InputError, match="the disk is full"):
        put_all(Delivery(full, depth=1, patience_s=WAIT_S), 1_000_000)
    assert arrived == [0, 1]


def test_an_error_of_the_last_one_is_not_lost() -> None:
    def broken(_: int) -> None:
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        put_all(Delivery(broken, depth=1, patience_s=WAIT_S), 1)


def test_a_bad_end_keeps_its_own_error_and_delivers_what_was_put() -> None:
    arrived: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        put_all(Delivery(arrived.append, depth=3, patience_s=WAIT_S), 3, then=KeyboardInterrupt())
    assert arrived == [0, 1, 2]


def test_one_that_never_ends_is_told() -> None:
    release = threading.Event()

    def stuck(_: int) -> None:
        release.wait(WAIT_S)

    delivery: Delivery[int] = Delivery(stuck, depth=1, patience_s=0.2)
    try:
        with pytest.raises(StreamdiffError, match=r"could not be delivered within 0\.2 s"):
            put_all(delivery, 3)
        assert not delivery.is_over
    finally:
        release.set()
