"""SIGINT and SIGTERM end a command at any moment, with their exit status, and cut nothing in two."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.generate.processes import TIMEOUT_S, environment, write_inputs
from tests.hostile.moments import COMMANDS, Moment, faults, made_film, moments

pytestmark = pytest.mark.processes

_HEAD = """
import os, signal, sys, time
from streamdiff import signals
signals.PATIENCE_S = 0.4
signals.handle()
def send(number): os.kill(os.getpid(), getattr(signal, number))
"""


def ended(program: str, *, timeout_s: float = 60.0) -> tuple[int, str]:
    """Exit status and output of a program that has `signals` and ``send``."""
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + textwrap.dedent(program)],
        env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def old_film() -> bytes:
    return made_film()


@pytest.mark.parametrize(("name", "error"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "SystemExit")])
def test_a_signal_waits_for_the_end_of_a_shielded_block(name: str, error: str) -> None:
    status, said = ended(f"""
        try:
            with signals.shielded():
                with signals.shielded():
                    send("{name}")
                    send("SIGINT")
                    print("whole")
                print("still whole")
            print("too far")
        except {error}:
            print("obeyed", signals.received() == signal.{name})
            os._exit(0)
    """)
    assert (status, said.split("\n")[:3]) == (0, ["whole", "still whole", "obeyed True"])


def test_what_is_cleaned_up_is_not_cut_by_a_second_signal() -> None:
    status, said = ended("""
        try:
            try:
                send("SIGTERM")
            finally:
                send("SIGINT")
                send("SIGTERM")
                print("closed")
        except SystemExit as error:
            print("status", error.code)
            os._exit(0)
    """)
    assert (status, said) == (0, "closed\nstatus 143\n")


def test_an_exception_that_was_lost_is_raised_again() -> None:
    status, said = ended("""
        class Careless:
            def __del__(self):
                send("SIGTERM")
                time.sleep(0)
        Careless()
        print("lost", flush=True)
        try:
            while True:
                time.sleep(0.01)
        except SystemExit as error:
            print("raised again", error.code, flush=True)
            os._exit(0)
    """)
    assert (status, said) == (0, "lost\nraised again 143\n")


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_process_that_does_not_come_back_is_ended(name: str, status: int) -> None:
    """A call that holds the main thread, as a step of a large model may, and never looks at signals."""
    found, said = ended(f"""
        import threading
        threading.Timer(0.1, lambda: send("{name}")).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [])
        import ctypes
        libc = ctypes.CDLL(None)
        end = time.monotonic() + 50
        while time.monotonic() < end:
            try:
                libc.usleep(900_000)
            except BaseException:
                pass
    """)
    assert (found, said) == (status, "ended by a signal; what was written so far is whole\n")


def test_an_interrupt_from_within_is_no_signal() -> None:
    status, said = ended("""
        import threading
        threading.Timer(0.1, signals.interrupt_main).start()
        try:
            time.sleep(50)
        except KeyboardInterrupt:
            print("received", signals.received())
        time.sleep(signals.PATIENCE_S + 0.5)
        print("alive")
    """)
    assert (status, said) == (0, "received None\nalive\n")


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", ""])
@pytest.mark.parametrize("last", ["SIGINT", "SIGTERM"])
def test_a_signal_between_the_last_instructions_of_a_command_changes_no_status(first: str, last: str) -> None:
    """When the command has returned, or its error has been said, and nothing is caught any more."""
    status, said = ended(f"""
        import argparse
        from streamdiff.cli import main
        def run(args):
            signals.handle()
            if {first!r}:
                send({first!r})
            return 0
        def done(done=signals.done):
            send({last!r})
            done()
        signals.done = done
        args = argparse.Namespace(run=run, verbose=False)
        main.parser = lambda argv: argparse.Namespace(parse_args=lambda argv: args)
        main.entry()
    """)
    assert status == 128 + getattr(signal, first or last)
    assert "Traceback" not in said
    assert len(said.splitlines()) == bool(first), said


def test_signals_are_left_to_programs_that_handle_them() -> None:
    status, said = ended("""
        signal.signal(signal.SIGTERM, lambda *_: print("mine"))
        send("SIGTERM")
        time.sleep(signals.PATIENCE_S + 0.5)
        print(signals.received())
    """)
    assert (status, said) == (0, "mine\nNone\n")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_stop_nothing(tmp_path: Path, closed: str, old_film: bytes) -> None:
    del old_film
    out = tmp_path / "film.mp4"
    words = ["generate", "--preset", "tiny", *write_inputs(tmp_path), "--seconds", "0.5", "--out", str(out)]
    shell = f'exec "$0" -m streamdiff "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable, *words], env=environment(), timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0
    assert out.stat().st_size > 1_000


@pytest.mark.slow
@pytest.mark.parametrize("moment", [*moments(17, 12)], ids=lambda m: f"{m.command}-{m.number.name}-{m.after_s:.2f}")
def test_twelve_moments(moment: Moment, old_film: bytes) -> None:
    assert faults(moment, old_film, within_s=60.0) == []


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_four_hundred_moments(old_film: bytes) -> None:
    """Within two seconds of the last signal: on a machine that has two cores to itself."""
    found = {at: faults(moment, old_film) for at, moment in enumerate(moments(1, 400, COMMANDS))}
    assert {at: wrong for at, wrong in found.items() if wrong} == {}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a process of its parent's death on Linux only")
def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """While ranks import, they know nothing of a store or of each other yet."""
    words = ["generate", *write_inputs(tmp_path), "--seconds", "600", "--out", str(tmp_path / "film.mp4")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    # The ranks' standard output is a pipe whose other end is here: it ends when the last of them has.
    process = subprocess.Popen(
        [*launcher, "-m", "streamdiff", *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        _wait_for_children(process.pid, 3)
        process.kill()
        process.wait(30)
        ended, _, _ = select.select([process.stdout], [], [], 60.0)
        assert ended, "a rank was left behind"
        assert process.stdout.read() == b""
    finally:
        process.kill()
        if process.stdout is not None:
            process.stdout.close()


def _wait_for_children(pid: int, count: int, *, timeout_s: float = 120.0) -> None:
    end_s = time.monotonic() + timeout_s
    while len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) < count:
        assert time.monotonic() < end_s
        time.sleep(0.01)
