"""A seat is held, renewed, waited for and given back; every lease ends for a reason."""

from __future__ import annotations

import asyncio

import pytest

from streamdiff.errors import ConfigError
from streamdiff.serve.leases import Draining, Leases, NoCapacity, Terms, UserLimit
from streamdiff.serve.protocol import Ending


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_seat_after_the_last_is_refused_with_a_time_to_ask_again(clock: Clock) -> None:
    leases = Leases(Terms(capacity=2, idle_s=40, linger_s=500), clock=clock)
    first = leases.acquire("ann")
    clock.now_s += 10
    leases.acquire("bob")
    with pytest.raises(NoCapacity, match="all 2 sessions") as refused:
        leases.acquire("cid")
    assert refused.value.retry_after_s == 30  # ann's seat is idle in 30 s
    leases.touch(first)
    with pytest.raises(NoCapacity) as refused:
        leases.acquire("cid")
    assert refused.value.retry_after_s == 40
    leases.release(first, Ending.LEFT)
    assert leases.acquire("cid").id != first.id


def test_one_user_cannot_take_every_seat(clock: Clock) -> None:
    leases = Leases(Terms(capacity=4, per_user=2), clock=clock)
    leases.acquire("ann")
    leases.acquire("ann")
    with pytest.raises(UserLimit) as refused:
        leases.acquire("ann")
    assert refused.value.status == 429
    leases.acquire("bob")


def test_a_reserved_seat_is_for_those_with_priority(clock: Clock) -> None:
    leases = Leases(Terms(capacity=2, reserved=1), clock=clock)
    leases.acquire("ann")
    with pytest.raises(NoCapacity):
        leases.acquire("bob")
    leases.acquire("vip", priority=1)


@pytest.mark.parametrize(
    ("passes_s", "viewers", "active", "ending"),
    [
        (29.0, 0, False, None),
        (30.0, 0, True, Ending.GONE),
        (59.0, 1, False, None),
        (60.0, 1, False, Ending.IDLE),
        (60.0, 1, True, None),
        (300.0, 1, True, Ending.LIFETIME),
    ],
)
def test_a_lease_runs_out(clock: Clock, passes_s: float, viewers: int, active: bool, ending: Ending | None) -> None:
    leases = Leases(Terms(capacity=1, idle_s=60, lifetime_s=300, linger_s=30), clock=clock)
    lease = leases.acquire("ann")
    leases.watch(lease, viewers)
    clock.now_s += passes_s
    if active:
        leases.touch(lease)
    assert [reason for _, reason in leases.expired()] == ([] if ending is None else [ending])


def test_the_first_reason_stands_and_a_seat_is_given_back_once(clock: Clock) -> None:
    leases = Leases(Terms(capacity=1), clock=clock)
    lease = leases.acquire("ann")
    leases.release(lease, Ending.LEFT)
    other = leases.acquire("bob")
    leases.release(lease, Ending.FAILED)
    assert lease.ended is Ending.LEFT
    assert leases.held == (other,)


def test_those_who_wait_are_served_by_priority_then_by_arrival(clock: Clock) -> None:
    async def scene() -> list[str]:
        leases = Leases(Terms(capacity=1), clock=clock)
        holding = leases.acquire("first")
        order: list[str] = []

        async def visit(user: str, priority: int) -> None:
            lease = await leases.wait(user, priority=priority, timeout_s=5.0)
            order.append(user)
            await asyncio.sleep(0)
            leases.release(lease, Ending.LEFT)

        visits = [asyncio.create_task(visit(u, p)) for u, p in (("a", 0), ("b", 0), ("vip", 1))]
        await asyncio.sleep(0.01)
        with pytest.raises(NoCapacity):
            leases.acquire("pushy")
        leases.release(holding, Ending.LEFT)
        await asyncio.gather(*visits)
        assert leases.held == ()
        return order

    assert asyncio.run(scene()) == ["vip", "a", "b"]


def test_who_stops_waiting_holds_nothing(clock: Clock) -> None:
    async def scene() -> None:
        leases = Leases(Terms(capacity=1, max_waiting=1), clock=clock)
        holding = leases.acquire("first")
        with pytest.raises(NoCapacity, match=r"no seat came free in 0\.01 s"):
            await leases.wait("late", timeout_s=0.01)
        waiting = asyncio.create_task(leases.wait("gone", timeout_s=5.0))
        await asyncio.sleep(0.01)
        with pytest.raises(NoCapacity, match="all 1 sessions"):  # the queue is full
            await leases.wait("many", timeout_s=5.0)
        # The seat comes in the very moment in which the wait is given up.
        leases.release(holding, Ending.LEFT)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert leases.held == ()
        leases.acquire("next")

    asyncio.run(scene())


def test_draining_turns_everybody_away(clock: Clock) -> None:
    async def scene() -> None:
        leases = Leases(Terms(capacity=1), clock=clock)
        leases.acquire("first")
        waiting = asyncio.create_task(leases.wait("waits", timeout_s=5.0))
        await asyncio.sleep(0.01)
        leases.drain()
        with pytest.raises(Draining):
            await waiting
        with pytest.raises(Draining):
            leases.acquire("late")

    asyncio.run(scene())


def test_terms_that_cannot_work_are_refused() -> None:
    for terms in ({"capacity": 0}, {"capacity": 2, "reserved": 2}, {"capacity": 1, "per_user": 0}):
        with pytest.raises(ConfigError, match="capacity >= 1"):
            Terms(**terms)
    with pytest.raises(ConfigError, match="idle_s must be"):
        Terms(capacity=1, idle_s=0)
