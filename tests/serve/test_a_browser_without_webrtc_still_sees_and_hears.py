"""A browser whose network lets no UDP through: the page goes over to packets on a WebSocket, decoded by WebCodecs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve.test_a_browser_talks_to_it import QUESTION, SENTENCE, page_of, pytestmark, say, screen, serving, until

__all__ = ["pytestmark"]


def block_udp(page: Any) -> None:
    """Let neither end know an address of the other: nothing gets through, as behind a firewall."""

    def without_addresses(sdp: str) -> str:
        return "".join(line for line in sdp.splitlines(keepends=True) if not line.startswith("a=candidate"))

    def on_offer(route: Any) -> None:
        answer = route.fetch(post_data=json.dumps({"sdp": without_addresses(route.request.post_data_json["sdp"])}))
        route.fulfill(response=answer, body=json.dumps({"sdp": without_addresses(answer.json()["sdp"])}))

    page.route("**/v1/sessions/*/offer", on_offer)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that reads aloud what is typed."""
    with serving(tmp_path_factory.mktemp("reader"), "--mind", "none") as (url, _):
        yield url


def picture(page: Any) -> np.ndarray:
    """What the page has drawn."""
    pixels = page.evaluate(
        """() => { const c = document.createElement("canvas"); c.width = c.height = 64;
        const g = c.getContext("2d"); g.drawImage(document.getElementById("picture"), 0, 0, 64, 64);
        return [...g.getImageData(0, 0, 64, 64).data]; }"""
    )
    return np.asarray(pixels, np.float32).reshape(64, 64, 4)[..., :3]


def test_the_page_plays_over_a_websocket_in_step_and_can_be_interrupted(reader: str, tmp_path: Path) -> None:
    del tmp_path
    with page_of(reader) as page:
        block_udp(page)
        page.click("#start")
        until(page, "streamdiff.connections > 0 && streamdiff.ready", 60.0)
        assert page.evaluate("streamdiff.transport") == "websocket"
        until(page, "streamdiff.stats.decoded > 30")
        still = picture(page)
        assert still.std() > 10  # a face, not a blank canvas
        say(page, SENTENCE)
        until(page, "streamdiff.latencies.some((l) => l.stage === 'audible')")
        seen: list[float] = []
        moved = 0.0
        while page.evaluate("streamdiff.status") == "speaking" and len(seen) < 40:
            sync_ms = page.evaluate("streamdiff.sync_ms")
            seen += [] if sync_ms is None else [sync_ms]
            moved = max(moved, float(np.abs(picture(page) - still).mean()))
            page.wait_for_timeout(50)
        assert moved > 0.5  # the mouth
        assert abs(statistics.median(seen)) <= 40
        until(page, "streamdiff.status === 'idle'")
        assert page.inner_text("#captions") == SENTENCE
        stats = page.evaluate("streamdiff.stats")
        assert 1 <= stats["keys"] <= 3  # more only where a busy machine reads a second too late
        assert stats["decoded"] > 30
        screen(page, "without-webrtc")
        say(page, "one two three four five six seven eight nine ten " * 3)
        until(page, "streamdiff.status === 'speaking'")
        page.press("#text", "Escape")
        until(page, "streamdiff.latencies.some((l) => l.stage === 'silent')")
        assert page.evaluate("streamdiff.events.some((e) => e.type === 'stopped' && e.segment > 0)")
        page.click("#leave")
        until(page, "streamdiff.session === null")


def test_webrtc_is_taken_where_it_works(reader: str) -> None:
    with page_of(reader) as page:
        page.click("#start")
        until(page, "streamdiff.connections > 0 && streamdiff.ready")
        page.wait_for_timeout(7_000)  # longer than the page waits before it gives WebRTC up
        assert page.evaluate("streamdiff.transport") == "webrtc"
        assert page.evaluate("document.getElementById('picture').hidden")


def test_a_question_by_microphone_gets_through_without_webrtc(tmp_path: Path) -> None:
    pytest.importorskip("silero_vad", reason="no ear is installed: pip install 'streamdiff[listen]'")
    wav = tmp_path / "question.wav"
    subprocess.run([sys.executable, "-c", QUESTION, str(wav)], check=True, timeout=120)
    with serving(tmp_path) as (url, _), page_of(url, f"--use-file-for-fake-audio-capture={wav}%noloop") as page:
        block_udp(page)
        page.click("#start")
        until(page, "streamdiff.connections > 0 && streamdiff.ready", 60.0)
        assert page.evaluate("streamdiff.transport") == "websocket"
        page.click("#mic")
        until(page, "streamdiff.events.some(e => e.type === 'caption' && e.role === 'user' && e.final)", 60.0)
        asked = page.evaluate("streamdiff.events.filter(e => e.type === 'caption' && e.role === 'user').at(-1).text")
        assert "weather" in asked.lower()
        until(page, "streamdiff.status === 'speaking'", 20.0)
        page.click("#mic")
        until(page, "document.getElementById('mic').getAttribute('aria-pressed') === 'false'")
        page.click("#leave")
