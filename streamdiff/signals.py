"""SIGINT and SIGTERM: an exception in the main thread, at a moment when nothing is cut in two, and an end in any case.

    signals.handle()                        # once, in the main thread, when there is something to close
    with signals.shielded():
        file.write(...)                     # a signal is obeyed at the end of the block

The first signal raises KeyboardInterrupt or ``SystemExit(128 + number)``. An exception may be lost: import machinery,
callbacks and finalisers drop it. So a thread looks on: it raises again what was lost, and ends a process that is still
there after `PATIENCE_S`, in a long call perhaps, with the exit status of the signal. Further signals change nothing.

In a program that handles signals itself, `shielded` does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from types import FrameType, TracebackType

PATIENCE_S = 1.6
"""From the first signal to the end by force."""
_NUDGE_S = 0.2
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class _State:
    number: int | None = None
    """The first signal that asked to end."""
    depth: int = 0
    """Shielded blocks that the main thread is in."""
    is_due: bool = False
    """A signal came within a shielded block."""
    is_inner: bool = False
    """The next SIGINT comes from `interrupt_main`."""
    num_inner: int = 0
    """How often it was called."""
    is_over: bool = False
    """The command has ended, and only its exit status is left to give."""
    wakeup: tuple[int, int] | None = None
    """A pipe into which the interpreter writes the number of each signal, whatever the main thread is doing."""


_state = _State()


def received() -> int | None:
    """The signal that asked this process to end; None, also where signals are not handled here."""
    return _state.number


def handles() -> bool:
    """Whether SIGINT is obeyed as above; otherwise the program that imports this does as it likes."""
    return signal.getsignal(signal.SIGINT) is _on_signal


def handle() -> None:
    """From here on signals are obeyed as above. Elsewhere than in the main thread they are somebody else's business."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _NUMBERS:
        signal.signal(number, _on_signal)
    if _state.wakeup is None:
        _state.wakeup = os.pipe()
        for end in _state.wakeup:
            os.set_inheritable(end, False)
        os.set_blocking(_state.wakeup[1], False)
        threading.Thread(target=_look_on, args=(_state.wakeup[0],), name="signals", daemon=True).start()
        _be_quiet_about_lost_exceptions()
    signal.set_wakeup_fd(_state.wakeup[1], warn_on_full_buffer=False)


def leave_alone() -> None:
    """Let signals end the process as they would any other: there is nothing to close."""
    if threading.current_thread() is threading.main_thread():
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_DFL)


def done() -> None:
    """The command has ended: a signal that was obeyed is obeyed, and others do what they always do."""
    if _state.number is not None:
        _state.is_over = True
    elif threading.current_thread() is threading.main_thread() and handles():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class shielded:  # noqa: N801  reads as contextlib's
    """A block that no signal cuts in two; one that came meanwhile is obeyed at its end."""

    def __init__(self) -> None:
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self._is_main:
            _state.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_main:
            return
        _state.depth -= 1
        if _state.depth == 0 and _state.is_due:
            _state.is_due = False
            _obey(error)


def interrupt_main() -> bool:
    """Raise KeyboardInterrupt in the main thread, from another one, as Ctrl-C would; whether that is possible.

    It is no signal from outside: `received` stays as it is. Where signals are handled here it may be called again: what
    is on its way already is not disturbed.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is _on_signal:
        _state.is_inner = True
        _state.num_inner += 1
    elif handler is not signal.default_int_handler:
        return False
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    return True


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if _state.is_over:
        return
    if number == signal.SIGINT and _state.is_inner:
        _state.is_inner = False
        if _comes_from_a_signal(sys.exc_info()[1]):
            return
        raise KeyboardInterrupt
    if _state.number is None:
        _state.number = number
    if _state.depth:
        _state.is_due = True
    else:
        _obey(sys.exc_info()[1])


def _obey(handled: BaseException | None) -> None:
    """Raise what the signal asks for, unless the exception that is being handled comes from it already."""
    number = _state.number
    if number is None or _comes_from_a_signal(handled):
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _comes_from_a_signal(error: BaseException | None) -> bool:
    seen: set[int] = set()
    ahead = [error]
    while ahead:
        error = ahead.pop()
        if error is None or id(error) in seen:
            continue
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return True
        seen.add(id(error))
        ahead += [error.__cause__, error.__context__]
    return False


def _look_on(wakeup: int) -> None:
    """See that what a signal asks for happens."""
    num_inner = 0
    while True:
        number = (os.read(wakeup, 1) or b"\0")[0]
        if number == signal.SIGINT and num_inner < _state.num_inner:
            num_inner += 1
        # Not where somebody else handles them: training ends its step first, a server its sentences.
        elif number in _NUMBERS and signal.getsignal(number) is _on_signal:
            break
    pause = threading.Event()
    for _ in range(round(PATIENCE_S / _NUDGE_S)):
        pause.wait(_NUDGE_S)
        if signal.getsignal(number) is _on_signal:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
    with contextlib.suppress(OSError):
        os.write(2, b"ended by a signal; what was written so far is whole\n")
    os._exit(128 + (_state.number or number))


def _be_quiet_about_lost_exceptions() -> None:
    """A finaliser that a signal cut short is no news: the exception is raised again."""
    before = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs, /) -> None:
        if received() is None or not issubclass(lost.exc_type, KeyboardInterrupt | SystemExit):
            before(lost)

    sys.unraisablehook = hook
