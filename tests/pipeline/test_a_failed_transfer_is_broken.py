"""A transfer between GPUs that failed breaks the connection, and one that is done is simply done.

NCCL's work counts as completed either way, and has no `is_success`: asking for it ends the rank at its first message.
"""

from __future__ import annotations

import pytest

from streamdiff.pipeline.transport import Broken, EdgeEnd


class NcclWork:
    """What current ``ProcessGroupNCCL`` gives: completed after a while, and what went wrong is raised by waiting."""

    def __init__(self, error: str | None = None, looks: int = 3) -> None:
        self._error, self._looks = error, looks
        self.waited = False

    def is_completed(self) -> bool:
        self._looks -= 1
        return self._looks <= 0

    def is_success(self) -> bool:
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")

    def wait(self) -> bool:
        assert self._looks <= 0, "waiting for a peer that may be dead"
        self.waited = True
        if self._error is not None:
            raise RuntimeError(self._error)
        return True


class Fallen(Exception):  # noqa: N818
    pass


def end(check: object = lambda: None) -> EdgeEnd:
    edge_end = object.__new__(EdgeEnd)
    edge_end._check = check  # type: ignore[assignment]
    return edge_end


def test_a_transfer_that_is_done_is_waited_for_once_it_is_over() -> None:
    work = NcclWork()
    end()._finish_transfer(work)
    assert work.waited


def test_a_transfer_that_failed_breaks_the_connection() -> None:
    work = NcclWork("[Rank 0] NCCL error: remote process exited. Advice that helps nobody.")
    with pytest.raises(Broken, match=r"remote process exited$"):
        end()._finish_transfer(work)


def test_a_fallen_stream_ends_the_wait_for_a_transfer() -> None:
    def check() -> None:
        raise Fallen

    with pytest.raises(Fallen):
        end(check)._finish_transfer(NcclWork(looks=10**9))
