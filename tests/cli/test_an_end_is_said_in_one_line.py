"""Why a command has ended: one line, and the exit status that belongs to it."""

from __future__ import annotations

import errno
import signal

import pytest

from streamdiff import signals
from streamdiff.cli.main import _ended
from streamdiff.errors import InputError, RankFailed

NOTE = "the film so far, 2.00 s, is film.part.mp4"


def told(error: BaseException) -> BaseException:
    error.add_note(NOTE)
    return error


def from_a(cause: BaseException, error: BaseException) -> BaseException:
    error.__cause__ = told(cause)
    return error


STOPPED, DEAD = (
    RankFailed(f"rank 1 {what}", rank=1, was_stopped=what != "died") for what in ("was told to stop", "died")
)


@pytest.mark.parametrize(("error", "received", "status", "said"), [
    (told(KeyboardInterrupt()), None, 130, f"interrupted; {NOTE}"),
    (told(KeyboardInterrupt()), signal.SIGINT, 130, f"interrupted; {NOTE}"),
    (SystemExit(143), signal.SIGTERM, 143, "terminated; what was written so far is whole"),
    (from_a(SystemExit(143), STOPPED), signal.SIGTERM, 143, f"terminated; {NOTE}"),
    (RuntimeError("a step that a signal cut"), signal.SIGINT, 130, "interrupted; what was written so far is whole"),
    (DEAD, signal.SIGTERM, 1, "error: rank 1 died"),
    (told(InputError("cannot write to film.mp4: No space left")), None, 2,
     f"error: cannot write to film.mp4: No space left; {NOTE}"),
    (OSError(errno.ENOSPC, "No space left on device"), None, 1, "error: No space left on device; free some space"),
])  # fmt: skip
def test_an_end(
    error: BaseException, received: int | None, status: int, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(signals, "received", lambda: received)
    assert _ended(error, verbose=False) == status
    assert capsys.readouterr().err == said + "\n"


def test_what_nobody_expected_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        _ended(ZeroDivisionError(), verbose=False)
