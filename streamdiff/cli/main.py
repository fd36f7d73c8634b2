"""The command ``streamdiff``: finds the sub-command, runs it, and turns errors and signals into exit statuses.

Only the module of the command that was asked for is imported, and that imports torch when it has something to compute:
``--version``, ``--help`` and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from streamdiff import __version__, signals
from streamdiff.cli.machine import (
    alike_on_every_rank,
    end_with_the_launcher,
    leave,
    leave_at_once,
    open_standard_streams,
    say,
    set_environment,
)
from streamdiff.errors import ConfigError, RankFailed, StreamdiffError
from streamdiff.facts import printable
from streamdiff.options import Parser


@dataclass(frozen=True, slots=True)
class Command:
    """A sub-command: one line of help, and the module with its ``DESCRIPTION``, ``add_arguments`` and ``run``."""

    help: str
    module: str


COMMANDS: Mapping[str, Command] = {
    "generate": Command("a photo, a voice and a prompt in, a talking video out", "generate"),
    "talk": Command("a photo says a text, on this machine", "talk"),
    "serve": Command("talk to a face in the browser", "serve"),
    "line": Command("ranks that wait, models loaded, for a program with streams", "line"),
    "avatar": Command("make, fit and look at avatars", "avatar"),
    "train": Command("train the models, recipe by recipe", "train"),
    "verify": Command("whether a film or an audit log is what it says", "verify"),
    "doctor": Command("what this machine can do, and why not more", "doctor"),
}


def parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; of ``argv``, only the command that it names gets its options. None: all do."""
    root = Parser(prog="streamdiff", description="Pipeline-parallel streaming diffusion for live avatars.")
    root.add_argument("--version", action="version", version=f"streamdiff {__version__}")
    root.add_argument("-v", "--verbose", action="store_true", help="log what happens, on stderr")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = None if argv is None else next((word for word in argv if not word.startswith("-")), "")
    for name, command in COMMANDS.items():
        if wanted in (None, name):
            module = importlib.import_module(f"streamdiff.cli.{command.module}")
            sub = commands.add_parser(
                name,
                help=command.help,
                description=getattr(module, "DESCRIPTION", command.help[0].upper() + command.help[1:] + "."),
                formatter_class=getattr(module, "FORMATTER", argparse.HelpFormatter),
            )
            sub.set_defaults(run=getattr(module, "run", None))
            module.add_arguments(sub)
        else:
            commands.add_parser(name, help=command.help, add_help=False)
    return root


def entry() -> NoReturn:
    """The command as a process of its own: a run that a signal has ended waits for no thread."""
    try:
        status = main()
    except KeyboardInterrupt:  # between the last instructions of a command, where nothing is left to close
        signals.done()
        status = 128 + (signals.received() or signal.SIGINT)
    except SystemExit as error:  # of argparse: help, or wrong arguments; of SIGTERM, as above
        signals.done()
        status = error.code if isinstance(error.code, int) else 1
    if status > 128:
        leave_at_once(status)
    try:
        sys.stdout.flush()
    except OSError as error:
        say(f"error: standard output takes no more: {error.strerror}; what else was written is whole")
        leave_at_once(status or 1)
    # Else the interpreter looks for garbage in all that was imported before it ends: a second of CPU time with torch.
    gc.freeze()
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 success, 1 failure, 2 usage error, 128 + N ended by signal N."""
    set_environment()
    signals.leave_alone()  # a command handles them as soon as it has something to close
    open_standard_streams()
    end_with_the_launcher()
    argv = sys.argv[1:] if argv is None else argv
    verbose = False
    try:
        args = alike_on_every_rank(lambda: parser(argv).parse_args(argv))
        args.argv = tuple(argv)
        verbose = args.verbose
        logging.basicConfig(
            level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
        )
        status = args.run(args)
    except BaseException as error:  # noqa: BLE001  what is not known is raised again
        status = _ended(error, verbose=verbose)
        signals.done()  # while the error is handled, a further signal raises nothing
    finally:
        signals.done()
    if status == 0 and (number := signals.received()) is not None:
        status = 128 + number
    return leave(status) if status else 0


def _notes(error: BaseException | None) -> list[str]:
    """What was noted about an error and those that it came from: where the film is."""
    notes: list[str] = []
    while error is not None:
        notes += [note for note in getattr(error, "__notes__", []) if note not in notes]
        error = error.__cause__
    return notes


def _ended(error: BaseException, *, verbose: bool) -> int:
    """Say why a command has ended; its exit status."""
    notes = _notes(error)
    number = signals.received()
    was_told = number is not None and not (isinstance(error, RankFailed) and not error.was_stopped)
    match error:
        case _ if was_told or isinstance(error, KeyboardInterrupt):
            number = number or signal.SIGINT
            word = "interrupted" if number == signal.SIGINT else "terminated"
            say(printable("; ".join([word, *(notes or ["what was written so far is whole"])]), 4000))
            return 128 + number
        case StreamdiffError():
            short = [note for note in notes if "\n" not in note]
            words = "; ".join([f"error: {error}", *short])
            # A name with a line end makes no second line.
            first = [words] if error.exit_code == 2 else words.splitlines()
            for line in (*first, *(line for note in notes if note not in short for line in note.splitlines())):
                say(printable(line, 4000))  # names of files and ranks' words come from strangers
            if verbose:
                logging.getLogger(__name__).error("the error in full", exc_info=error)
            return error.exit_code
        case OSError() if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            say(f"error: {error.strerror}{f': {error.filename}' if error.filename else ''}; free some space")
            return 1
        case BrokenPipeError():
            # Whoever read our output has gone; nothing is left to say, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case OSError() if error.filename is not None:
            # A name that is too long, a loop of links: what no reader expects, but the system says which file it is.
            say(printable(f"error: {error.filename}: {error.strerror}; check the name", 4000))
            if verbose:
                logging.getLogger(__name__).error("the error in full", exc_info=error)
            return ConfigError.exit_code
        case SystemExit():
            return error.code if isinstance(error.code, int) else 1
        case _:
            raise error
