"""One thread per process, and no process that a test does not announce.

The suite starts many processes, and a second thread on a busy machine makes each of them slower. `poe fast` leaves out
what is marked ``processes``, so a test that starts one without the mark fails.
"""

from __future__ import annotations

import multiprocessing.process
import signal
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.skips import Skips

torch.set_num_threads(1)
# A busy machine makes no example wrong; a test that hangs is ended by its own time limit.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"})
"""Audit events of Python that begin a process."""
_unannounced: list[pytest.Item] = []
"""The test that is running, where it may not start a process."""


class UnannouncedProcessError(Exception):
    """A test starts a process and is not marked ``processes``."""


def _refuse() -> None:
    if _unannounced:
        raise UnannouncedProcessError(
            f"{_unannounced[-1].nodeid} starts a process; mark it with @pytest.mark.processes, or do without"
        )


def _on_audit(event: str, _: tuple[object, ...], starts: frozenset[str] = STARTS) -> None:
    if event in starts:
        _refuse()


def _start(process: multiprocessing.process.BaseProcess) -> None:
    _refuse()
    _started(process)


# What a script starts in the background inherits that SIGINT is ignored, and so would all processes of the tests.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_started = multiprocessing.process.BaseProcess.start
multiprocessing.process.BaseProcess.start = _start  # a process of a fork server raises no audit event
sys.addaudithook(_on_audit)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-other-skips", action="store_true", help="fail when a test is skipped unexpectedly")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Skips(strict=config.getoption("--no-other-skips")), "skips")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    announced = item.get_closest_marker("processes") or item.get_closest_marker("slow")
    _unannounced[:] = [] if announced else [item]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return (yield)
    finally:
        _unannounced.clear()
        # Commands set both for their process, which here is everybody's.
        torch.set_flush_denormal(False)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
