"""The end of the line in a thread of its own: while a chunk is written, the next one is made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from streamdiff.errors import StreamdiffError
from streamdiff.pipeline.link import POLL_S, Mailbox

T = TypeVar("T")


class Delivery(Generic[T]):
    """Hands things to ``deliver`` in a thread, one after the other, in the order of `put`. A context manager.

    At most ``depth`` of them wait; then `put` waits too. What ``deliver`` raises is raised by the next `put` or by the
    end of the ``with`` block, and nothing is delivered after it. The block ends when all that was put is delivered,
    also when it ends badly.

    Raises StreamdiffError when one delivery takes longer than ``patience_s``; its thread may then still be in it.
    """

    def __init__(self, deliver: Callable[[T], None], *, depth: int, patience_s: float) -> None:
        self._deliver, self._patience_s = deliver, patience_s
        self._waiting: Mailbox[tuple[T] | None] = Mailbox(depth, self._check)
        self._busy_since_s: float | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    def put(self, thing: T) -> None:
        """Leave it to the thread; waits while ``depth`` others are waiting."""
        self._waiting.put((thing,))

    @property
    def is_over(self) -> bool:
        """Whether ``deliver`` is not being called and will not be again."""
        return not self._thread.is_alive()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        since_s = self._busy_since_s
        if since_s is not None and time.monotonic() - since_s > self._patience_s:
            raise StreamdiffError(
                f"a chunk could not be delivered within {self._patience_s:g} s; look at where it goes: a disk, a reader"
            )

    def _run(self) -> None:
        try:
            # Its end is a None, so the wait for the next thing has no end of its own.
            while (entry := self._waiting.get(lambda: None)) is not None:
                self._busy_since_s = time.monotonic()
                self._deliver(*entry)
                self._busy_since_s = None
        except BaseException as error:  # noqa: BLE001  raised again where things are put
            self._error = error

    def __enter__(self) -> Delivery[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._waiting.put(None)
            while not self.is_over:
                self._check()
                self._thread.join(POLL_S)
            self._check()
        except Exception:
            if error is None:  # else the block's own error is the one to tell
                raise
