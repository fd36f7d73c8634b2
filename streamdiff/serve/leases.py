"""Leases: who holds a seat, for how long, and who waits for one.

A session is leased before anything is allocated for it. All of this is arithmetic over a clock that is handed in: no
tasks, no sockets; `Leases.expired` says who has to go and why.

>>> now = 0.0
>>> leases = Leases(Terms(capacity=1, idle_s=60), clock=lambda: now)
>>> lease = leases.acquire("ann")
>>> try: leases.acquire("bob")
... except NoCapacity as error: print(error.retry_after_s)
30
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from streamdiff.errors import ConfigError, StreamdiffError
from streamdiff.serve.protocol import Ending


class Refused(StreamdiffError, RuntimeError):  # noqa: N818  it says what happened
    """No lease was given. ``retry_after_s``: whole seconds after which asking again makes sense."""

    code = "refused"
    status = 503

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoCapacity(Refused):
    """Every seat is taken."""

    code = "capacity_exhausted"


class UserLimit(Refused):
    """This user holds as many sessions as one user may."""

    code = "user_session_limit"
    status = 429


class Draining(Refused):
    """The server is shutting down and takes nobody in."""

    code = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The terms of every lease."""

    capacity: int
    """Sessions at once."""
    per_user: int | None = None
    """Sessions at once of one user; None: as many as there are."""
    reserved: int = 0
    """Seats that only a lease of ``priority`` > 0 may take."""
    idle_s: float = 300.0
    """A session in which nobody does anything for so long ends."""
    lifetime_s: float = 3600.0
    """A session ends after so long in any case."""
    linger_s: float = 30.0
    """A session that lost its last viewer waits so long for one to come back."""
    max_waiting: int = 64
    """Requests that may wait for a seat."""

    def __post_init__(self) -> None:
        if self.capacity < 1 or not 0 <= self.reserved < self.capacity or self.per_user == 0:
            raise ConfigError(
                f"leases need capacity >= 1, 0 <= reserved < capacity and per_user >= 1, got {self.capacity}, "
                f"{self.reserved}, {self.per_user}; try capacity=1, reserved=0"
            )
        for name in ("idle_s", "lifetime_s", "linger_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a time above 0 seconds, got {getattr(self, name)}")


@dataclass(slots=True, eq=False)
class Lease:
    """One seat, held. Times are on the clock of its `Leases`."""

    id: str
    """Unguessable: whoever knows it may use the session."""
    user: str
    priority: int
    since_s: float
    active_s: float
    """Last time that somebody did something."""
    seen_s: float
    """Last time that somebody watched."""
    num_viewers: int = 0
    ended: Ending | None = None


@dataclass(slots=True, order=True)
class _Waiter:
    """Orders by priority, then by arrival."""

    urgency: int
    arrival: int
    user: str = field(compare=False)
    granted: asyncio.Future[Lease] = field(compare=False)


class Leases:
    """The seats of one server. All calls from one thread (the event loop's)."""

    def __init__(self, terms: Terms, *, clock: Callable[[], float] = time.monotonic, prefix: str = "") -> None:
        self.terms = terms
        self.prefix = prefix
        """Begins every id: where several processes share a port, it says which of them holds the session."""
        self._clock = clock
        self._held: dict[str, Lease] = {}
        self._waiting: list[_Waiter] = []
        self._arrivals = itertools.count()
        self._draining = False

    @property
    def held(self) -> tuple[Lease, ...]:
        """Leases that stand, oldest first."""
        return tuple(self._held.values())

    @property
    def num_free(self) -> int:
        """Seats that anybody may take."""
        return max(0, self.terms.capacity - self.terms.reserved - len(self._held))

    @property
    def is_draining(self) -> bool:
        """Whether nobody is taken in any more."""
        return self._draining

    def acquire(self, user: str, *, priority: int = 0) -> Lease:
        """Take a seat now.

        Raises:
            NoCapacity, UserLimit, Draining: no seat; ``retry_after_s`` says when to ask again.
        """
        self._check_user(user)
        if self._room(priority) < 1 or any(waiter.urgency <= -priority for waiter in self._waiting):
            after_s = self.retry_after_s()
            raise NoCapacity(
                f"all {self.terms.capacity} sessions are taken; ask again in {after_s} s", retry_after_s=after_s
            )
        return self._grant(user, priority)

    async def wait(self, user: str, *, priority: int = 0, timeout_s: float) -> Lease:
        """Take a seat as soon as there is one: higher priority first, then who came first. Errors as `acquire`."""
        try:
            return self.acquire(user, priority=priority)
        except NoCapacity:
            if len(self._waiting) >= self.terms.max_waiting or timeout_s <= 0:
                raise
        granted: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(-priority, next(self._arrivals), user, granted)
        self._waiting.append(waiter)
        self._waiting.sort()
        try:
            await asyncio.wait([granted], timeout=timeout_s)
        except asyncio.CancelledError:
            # Who gives up holds nothing, not even a seat that came in the same moment.
            if granted.done() and granted.exception() is None:
                self.release(granted.result(), Ending.LEFT)
            raise
        finally:
            self._waiting = [other for other in self._waiting if other is not waiter]
        if granted.done():
            return granted.result()
        raise NoCapacity(f"no seat came free in {timeout_s:g} s", retry_after_s=self.retry_after_s())

    def find(self, lease_id: str) -> Lease | None:
        """The lease with this id, if it stands."""
        return self._held.get(lease_id)

    def touch(self, lease: Lease) -> None:
        """Somebody did something: the idle timeout begins anew."""
        lease.active_s = self._clock()

    def watch(self, lease: Lease, viewers: int) -> None:
        """So many watch now."""
        lease.num_viewers = viewers
        lease.seen_s = self._clock()

    def release(self, lease: Lease, reason: Ending) -> None:
        """Give the seat back; idempotent, the first reason stands."""
        if lease.ended is None:
            lease.ended = reason
        self._held.pop(lease.id, None)
        self._seat_waiters()

    def expired(self) -> list[tuple[Lease, Ending]]:
        """Leases whose time is up, and why. They stand until they are released."""
        now_s, terms = self._clock(), self.terms
        found: list[tuple[Lease, Ending]] = []
        for lease in self._held.values():
            if now_s - lease.since_s >= terms.lifetime_s:
                found.append((lease, Ending.LIFETIME))
            elif now_s - lease.active_s >= terms.idle_s:
                found.append((lease, Ending.IDLE))
            elif not lease.num_viewers and now_s - lease.seen_s >= terms.linger_s:
                found.append((lease, Ending.GONE))
        return found

    def drain(self) -> None:
        """Take nobody in any more; those who wait are told so."""
        self._draining = True
        for waiter in self._waiting:
            if not waiter.granted.done():
                waiter.granted.set_exception(self._shutting_down())
        self._waiting.clear()

    def retry_after_s(self) -> int:
        """When a seat may come free: the earliest time at which a lease can run out, 1 to 60 s."""
        now_s, terms = self._clock(), self.terms
        left_s = [
            min(
                lease.since_s + terms.lifetime_s,
                lease.active_s + terms.idle_s,
                math.inf if lease.num_viewers else lease.seen_s + terms.linger_s,
            )
            - now_s
            for lease in self._held.values()
        ]
        return max(1, min(60, math.ceil(min(left_s, default=1.0))))

    def _room(self, priority: int) -> int:
        reserved = 0 if priority > 0 else self.terms.reserved
        return self.terms.capacity - reserved - len(self._held)

    def _check_user(self, user: str) -> None:
        if self._draining:
            raise self._shutting_down()
        limit = self.terms.per_user
        if limit is not None and sum(lease.user == user for lease in self._held.values()) >= limit:
            raise UserLimit(
                f"this user holds {limit} of {limit} sessions; end one of them first",
                retry_after_s=self.retry_after_s(),
            )

    def _shutting_down(self) -> Draining:
        return Draining("the server is shutting down and takes no new sessions; ask another", retry_after_s=30)

    def _grant(self, user: str, priority: int) -> Lease:
        now_s = self._clock()
        lease = Lease(
            self.prefix + secrets.token_urlsafe(18), user, priority, since_s=now_s, active_s=now_s, seen_s=now_s
        )
        self._held[lease.id] = lease
        return lease

    def _seat_waiters(self) -> None:
        for waiter in tuple(self._waiting):
            if self._room(-waiter.urgency) < 1:
                continue
            try:
                self._check_user(waiter.user)
            except UserLimit as error:
                waiter.granted.set_exception(error)
            else:
                waiter.granted.set_result(self._grant(waiter.user, -waiter.urgency))
            self._waiting.remove(waiter)
