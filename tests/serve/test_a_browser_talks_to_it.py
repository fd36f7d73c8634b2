"""A real browser talks to a real server: the page plays, speaks, falls silent, and what a person sees can be looked at.

Headless Chromium against `streamdiff serve` in a process of its own; skipped where no browser is installed. What the
browser's own statistics say is believed; its screen is kept as a picture (`STREAMDIFF_SCREENS` names a folder).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(not BROWSER, reason="no browser is installed: apt-get install chromium"),
]
FLAGS = [
    "--no-sandbox",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]
SENTENCE = "This is a sentence that I would like to hear now."


@contextmanager
def serving(folder: Path, *options: str) -> Generator[tuple[str, subprocess.Popen[str]]]:
    """A server; its address and its process."""
    command = [sys.executable, "-m", "streamdiff", "serve", "--port", "0", "--capacity", "2", *options]
    with (
        (folder / "serve.log").open("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            found = re.match(r"(http://\S+)", process.stdout.readline())
            log.seek(0)
            assert found, log.read()
            yield found[1], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("reader"), "--mind", "none") as (url, _):
        yield url


@pytest.fixture
def reader(server: str) -> str:
    """A server that reads aloud what is typed, with both of its seats free: a page that only closed may come back."""
    until_s = time.monotonic() + 120
    while json.loads(urllib.request.urlopen(f"{server}readyz", timeout=10).read())["free"] != 2:
        assert time.monotonic() < until_s, "a seat was not given up"
        time.sleep(0.1)
    return server


@contextmanager
def page_of(url: str, *flags: str, **options: Any) -> Generator[Any]:
    """A page of a browser of its own; any error in it fails the test."""
    errors: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, headless=True, args=[*FLAGS, *flags])
        page = browser.new_page(**({"viewport": {"width": 1180, "height": 860}} | options))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if "Content Security" in m.text else None)
        page.goto(url)
        yield page
        leave(page)
        browser.close()
    assert errors == []


def leave(page: Any) -> None:
    """Give up the seat, which is otherwise held for a while for one who comes back."""
    page.evaluate(
        """async () => streamdiff.session &&
        await fetch(`/v1/sessions/${streamdiff.session}`, {method: "DELETE"}).catch(() => {})"""
    )


def until(page: Any, expression: str, timeout_s: float = 40.0) -> Any:
    """Wait for something in the page; its own way of waiting is an eval, which the page's policy forbids."""
    until_s = time.monotonic() + timeout_s
    while not (value := page.evaluate(expression)):
        assert time.monotonic() < until_s, f"{expression}: {page.evaluate('JSON.stringify(streamdiff.stats)')}"
        page.wait_for_timeout(20)
    return value


def start(page: Any) -> None:
    page.click("#start")
    until(page, "streamdiff.connections > 0 && streamdiff.ready")


def say(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def screen(page: Any, name: str) -> None:
    folder = os.environ.get("STREAMDIFF_SCREENS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def seen(page: Any) -> np.ndarray:
    """The picture that the video element shows."""
    pixels = page.evaluate(
        """() => { const c = document.createElement("canvas"); c.width = c.height = 64;
        const g = c.getContext("2d"); g.drawImage(document.getElementById("face"), 0, 0, 64, 64);
        return Array.from(g.getImageData(0, 0, 64, 64).data); }"""
    )
    return np.array(pixels, np.uint8).reshape(64, 64, 4)[..., :3]


def test_it_plays_25_frames_a_second_in_step_with_its_sound(reader: str) -> None:
    with page_of(reader) as page:
        screen(page, "start")
        start(page)
        rates: list[float] = []
        offsets: list[float] = []
        # A machine that is busy with other things is given time: five good seconds in a row are enough.
        for k in range(60):
            if k % 5 == 0:
                say(page, SENTENCE)
            page.wait_for_timeout(1_000)
            stats, offset = page.evaluate("[streamdiff.stats, streamdiff.sync_ms]")
            rates.append(stats.get("fps", 0.0))
            offsets.append(1e9 if offset is None else offset)
            if min(rates[-5:]) > 22 and statistics.median(map(abs, offsets[-5:])) <= 40 and k > 8:
                break
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        screen(page, "speaking")
        print(f"{rates} frames/s, audio - video {offsets}, {stats}")
        assert seen(page).std() > 20
        assert min(rates[-5:]) > 22
        assert statistics.median(map(abs, offsets[-5:])) <= 40
        assert stats["dropped"] <= 0.02 * stats["decoded"]
        assert stats["keys"] <= 3


def test_typed_text_is_heard_and_a_stop_silences_it(reader: str) -> None:
    with page_of(reader) as page:
        start(page)
        page.wait_for_timeout(2_000)
        for k in range(4):
            say(page, "This sentence goes on for long enough to be interrupted before it has come to its end.")
            until(page, f"streamdiff.latencies.filter(l => l.stage === 'audible').length === {k + 1}")
            page.wait_for_timeout(600)
            page.keyboard.press("Escape")
            until(page, f"streamdiff.latencies.filter(l => l.stage === 'silent').length === {k + 1}")
            until(page, "streamdiff.status === 'idle'")
            page.wait_for_timeout(500)
        for stage in ("audible", "silent"):
            times = page.evaluate(f"streamdiff.latencies.filter(l => l.stage === '{stage}').map(l => l.ms)")
            print(f"{stage}: median {statistics.median(times):.0f} ms of {[round(t) for t in times]}")
            assert statistics.median(times) < 3_000
        assert page.locator("#captions li.cut").count() == 4
        assert not page.evaluate("document.getElementById('face').muted && streamdiff.status !== 'idle'")


def test_a_reload_keeps_the_session(reader: str) -> None:
    with page_of(reader) as page:
        start(page)
        session = page.evaluate("streamdiff.session")
        page.reload()
        until(page, "document.getElementById('start').textContent === 'Continue'")
        start(page)
        assert page.evaluate("streamdiff.session") == session
        until(page, "streamdiff.stats.fps > 5")
        page.click("#leave")
        until(page, "document.getElementById('overlay-title').textContent === 'The session has ended'")


def test_who_finds_no_seat_is_told_when_to_come_again(reader: str) -> None:
    with page_of(reader) as page:
        ids = page.evaluate(
            """async () => { const ids = []; for (let k = 0; k < 2; k++) {
            const a = await fetch("/v1/sessions", {method: "POST"}); ids.push((await a.json()).id); } return ids; }"""
        )
        page.click("#start")
        until(page, "document.getElementById('overlay-title').textContent === 'All seats are taken'")
        screen(page, "full")
        page.evaluate(
            "async (ids) => { for (const id of ids) await fetch(`/v1/sessions/${id}`, {method: 'DELETE'}); }", ids
        )
        # A seat is free when its session has been closed, a moment after it was given up.
        until(page, "(async () => (await (await fetch('/readyz')).json()).free === 2)()")
        page.click("#start")
        until(page, "streamdiff.connections > 0")
        page.click("#leave")


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_small_screen_holds_all_of_it(reader: str, scheme: str) -> None:
    with page_of(reader, viewport={"width": 360, "height": 740}, color_scheme=scheme) as page:
        start(page)
        until(page, "streamdiff.stats.fps > 5")
        say(page, SENTENCE)
        until(page, "streamdiff.status === 'speaking'")
        page.wait_for_timeout(700)
        screen(page, f"small-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for name in ("text", "send", "interrupt"):
            box = page.locator(f"#{name}").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
        page.click("#leave")


def test_everything_can_be_done_with_the_keyboard(reader: str) -> None:
    with page_of(reader) as page:
        page.focus("#start")
        page.keyboard.press("Enter")
        until(page, "streamdiff.connections > 0")
        until(page, "document.activeElement.id === 'text'")
        page.keyboard.type("Hello there, this was typed without a mouse.")
        page.keyboard.press("Enter")
        until(page, "streamdiff.status === 'speaking'")
        page.keyboard.press("Escape")
        until(page, "streamdiff.status === 'idle'")
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select")].filter((e) => !e.hidden &&
            !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.id)"""
        )
        assert unnamed == []
        page.click("#leave")


def test_a_server_that_is_told_to_stop_lets_the_page_hear_the_end(tmp_path: Path) -> None:
    with serving(tmp_path, "--mind", "none", "--drain", "8") as (url, process), page_of(url) as page:
        start(page)
        say(page, "These are the last words.")
        until(page, "streamdiff.status === 'speaking'")
        process.send_signal(signal.SIGTERM)
        until(page, "document.getElementById('overlay-text').textContent === 'The server is shutting down.'")
        assert process.wait(15) == 0
        log = (tmp_path / "serve.log").read_text()
        assert "ended, drained" in log
        assert "Traceback" not in log


def test_a_question_by_microphone_is_answered_aloud(tmp_path: Path) -> None:
    pytest.importorskip("silero_vad", reason="no ear is installed: pip install 'streamdiff[listen]'")
    wav = tmp_path / "question.wav"
    subprocess.run([sys.executable, "-c", QUESTION, str(wav)], check=True, timeout=120)
    with serving(tmp_path) as (url, _), page_of(url, f"--use-file-for-fake-audio-capture={wav}%noloop") as page:
        start(page)
        page.click("#mic")
        until(page, "streamdiff.events.some(e => e.type === 'caption' && e.role === 'user' && e.final)", 40)
        until(page, "streamdiff.status === 'speaking'", 20)
        page.wait_for_timeout(1_500)
        screen(page, "answering")
        asked, answer = (
            page.evaluate(f"streamdiff.events.filter(e => e.type === 'caption' && e.role === '{role}').at(-1).text")
            for role in ("user", "avatar")
        )
        print(f"asked {asked!r}, answered {answer!r}")
        print([(e["stage"], e["ms"]) for e in page.evaluate("streamdiff.events.filter(e => e.type === 'latency')")])
        assert "weather" in asked.lower()
        assert "scripted" in answer
        until(page, "streamdiff.latencies.some(l => l.stage === 'answer')")


QUESTION = """
import sys, wave
import numpy as np
from streamdiff.voice import open_voice
voice = open_voice("heart")
chunks = [c.samples_S for c in voice.speak("How is the weather in London today?")]
quiet = np.zeros(voice.rate_hz * 3, np.float32)
sound = np.concatenate([quiet, *chunks, quiet, quiet, quiet, quiet])
with wave.open(sys.argv[1], "wb") as file:
    file.setnchannels(1); file.setsampwidth(2); file.setframerate(voice.rate_hz)
    file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
"""
