"""Every error that streamdiff raises on purpose, in one tree.

    StreamdiffError
    ├── ConfigError (ValueError)          a value that cannot work, found before anything runs
    │   └── InputError                    a file or a signal the user gave
    ├── CheckpointError (ValueError)      weights that do not fit the model
    ├── MemoryOrderError (RuntimeError)   a chunk written out of turn
    ├── ScheduleError (ValueError)        steps, ranks and edges that cannot stream
    ├── RankFailed (RuntimeError)         another rank died, hung or failed; carries its number
    ├── SessionClosed (RuntimeError)      a call after the stream ended
    ├── LineFull (RuntimeError)           no place on a line for one more stream; carries when to ask again
    ├── Unsupported (NotImplementedError) a call that this path of the engine cannot serve
    └── BackendError (RuntimeError)       an implementation that this machine cannot run

A message says what is wrong, why, and what to do: ``sigmas must fall from noise to data, got (0.2, 1.0); try ...``.
``exit_code`` is what the command line returns: 2 for what the user can mend by calling again, 1 for the rest.
"""

from __future__ import annotations


class StreamdiffError(Exception):
    """Root of the tree."""

    exit_code = 1


class ConfigError(StreamdiffError, ValueError):
    """A value that cannot work; raised when it is given, not when it is used."""

    exit_code = 2


class InputError(ConfigError):
    """A file or a signal from outside that cannot be used."""


class CheckpointError(StreamdiffError, ValueError):
    """Weights that do not fit the model; names every tensor concerned."""

    exit_code = 2


class MemoryOrderError(StreamdiffError, RuntimeError):
    """A chunk that is neither the next one nor the current one."""


class ScheduleError(StreamdiffError, ValueError):
    """Steps, ranks and edges that cannot stream."""

    exit_code = 2


class RankFailed(StreamdiffError, RuntimeError):  # noqa: N818  it says what happened
    """Another rank died, hung, or stopped with an error of its own.

    ``rank`` is the rank to blame, or None when it could not be told; ``was_stopped``: nothing failed there, it was told
    to stop.
    """

    def __init__(self, message: str, *, rank: int | None = None, was_stopped: bool = False) -> None:
        super().__init__(message)
        self.rank, self.was_stopped = rank, was_stopped


class SessionClosed(StreamdiffError, RuntimeError):  # noqa: N818
    """A call to a session whose stream has ended."""


class LineFull(StreamdiffError, RuntimeError):  # noqa: N818
    """A line of ranks has no seat, or no time, for one more stream.

    ``retry_after_s`` is the soonest that asking again makes sense; nobody knows when a stream will leave.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unsupported(StreamdiffError, NotImplementedError):  # noqa: N818
    """A call that a stream of this kind cannot serve; `Stream.can` says which it can."""

    exit_code = 2


class BackendError(StreamdiffError, RuntimeError):
    """An implementation was named that cannot run on this machine."""

    exit_code = 2
