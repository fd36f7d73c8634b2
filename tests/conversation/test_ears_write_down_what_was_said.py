"""Recognisers and the ear around them: real sound in, words out; and what they say about sound that is none."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from streamdiff.arrays import Floats
from streamdiff.conversation.ear import SpeechEar, _is_hum, open_ear
from streamdiff.conversation.recogniser import HostedRecogniser, fetch_moonshine
from streamdiff.conversation.turn import Event
from streamdiff.conversation.vad import HOP, RATE_HZ
from streamdiff.errors import BackendError, CheckpointError, ConfigError, InputError


class Hosted(BaseHTTPRequestHandler):
    """Answers what the test wants, and remembers what came."""

    answer = (200, b"{}")
    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.answer[0])
        self.end_headers()
        self.wfile.write(self.answer[1])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hosted() -> Iterator[tuple[str, type[Hosted]]]:
    handler = type("Handler", (Hosted,), {"bodies": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()
    thread.join(5)
    server.server_close()


def test_a_hosted_recogniser_is_sent_a_wave_file(hosted: tuple[str, type[Hosted]]) -> None:
    url, handler = hosted
    handler.answer = 200, json.dumps({"text": " Good day. "}).encode()
    assert HostedRecogniser(url, model="m").transcribe(np.full(160, 0.5, np.float32)) == "Good day."
    (body,) = handler.bodies
    assert b'name="model"\r\n\r\nm\r\n' in body
    at = body.index(b"RIFF")
    assert np.frombuffer(body[at + 44 : at + 44 + 320], "<i2").tolist() == [16383] * 160


@pytest.mark.parametrize("answer", [(500, b"broken"), (200, b"no json"), (200, b"[]"), (200, b'{"words": 1}')])
def test_a_hosted_recogniser_that_fails_says_where(hosted: tuple[str, type[Hosted]], answer: tuple[int, bytes]) -> None:
    url, handler = hosted
    handler.answer = answer
    with pytest.raises(BackendError, match="audio/transcriptions did not transcribe"):
        HostedRecogniser(url).transcribe(np.zeros(160, np.float32))


def test_an_ear_is_opened_by_name() -> None:
    with pytest.raises(ConfigError, match="moonshine, whisper"):
        open_ear("dragon")


def test_a_folder_that_is_no_moonshine_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from streamdiff.conversation.recogniser import _tokens

    with pytest.raises(CheckpointError, match="no vocabulary"):
        _tokens(b"\x05hello\x80")
    del tmp_path


class Counting:
    """A recogniser that waits, to be cancelled."""

    name, is_fast = "counting", True

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.was_cancelled = threading.Event()
        self.fails = False

    def transcribe(self, samples_S: Floats, cancelled: Callable[[], bool] = bool) -> str:
        if self.fails:
            raise RuntimeError("out of memory")
        self.begun.set()
        for _ in range(500):
            if cancelled():
                self.was_cancelled.set()
                return ""
            threading.Event().wait(0.01)
        return "late"


def test_a_dropped_transcription_ends_its_work_and_leaves_no_thread() -> None:

    async def drop() -> None:
        recogniser = Counting()
        ear = SpeechEar(recogniser)
        task = asyncio.create_task(ear.transcribe())
        await asyncio.to_thread(recogniser.begun.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(recogniser.was_cancelled.wait, 5)
        await ear.aclose()
        await ear.aclose()
        assert not [thread for thread in threading.enumerate() if "streamdiff-ear" in thread.name]

    asyncio.run(drop())


def test_a_recogniser_that_breaks_is_one_error_of_ours() -> None:
    async def fail() -> None:
        recogniser = Counting()
        recogniser.fails = True
        ear = SpeechEar(recogniser)
        with pytest.raises(BackendError, match="counting failed: out of memory"):
            await ear.transcribe()
        await ear.aclose()

    asyncio.run(fail())


def test_sound_that_is_none_is_refused() -> None:
    async def hear() -> None:
        ear = SpeechEar(Counting())
        with pytest.raises(InputError, match="NaN"):
            ear.hear(np.full(512, np.nan, np.float32), 16_000)
        with pytest.raises(InputError, match="8000"):
            ear.hear(np.zeros(512, np.float32), 100)
        with pytest.raises(InputError, match="shape"):
            ear.hear(np.zeros((2, 2, 2), np.float32), 16_000)
        assert ear.hear(np.zeros(16_000, np.int16), 48_000) == []
        await ear.aclose()

    asyncio.run(hear())


@pytest.mark.parametrize(("falls_db", "hums"), [(18.0, True), (6.0, False)])
def test_a_hum_is_told_from_a_vowel_by_what_lies_above_1_khz(falls_db: float, hums: bool) -> None:
    """Thirty harmonics of 120 Hz that fall by so much per octave: a closed mouth, and an open one."""
    t_S = np.arange(HOP) / RATE_HZ
    amplitudes = [10 ** (-falls_db / 20 * np.log2(n)) for n in range(1, 31)]
    sound_S = sum(a * np.sin(2 * np.pi * 120 * n * t_S) for n, a in enumerate(amplitudes, 1))
    assert _is_hum(np.asarray(sound_S, np.float32)) is hums


@pytest.mark.slow
def test_the_real_ear_hears_a_question_and_when_it_ends() -> None:
    """Another voice of the package asks; the words are right, and the turn ends within half a second of its end."""
    from streamdiff.voice.open import open_voice

    voice, rate_hz = open_voice("heart:pitch=0.8,tract=0.92"), 24_000
    question = "How long does it take to reach the village?"
    sound_S = np.concatenate([chunk.samples_S for chunk in voice.speak(question)])
    end_s = 0.5 + float(np.flatnonzero(np.abs(sound_S) > 0.02)[-1]) / rate_hz
    mic_S = np.concatenate([np.zeros(rate_hz // 2), sound_S, np.zeros(rate_hz)]).astype(np.float32)
    mic_S += 1e-3 * np.random.default_rng(0).standard_normal(len(mic_S)).astype(np.float32)

    async def hear() -> tuple[list[tuple[float, Event]], list[str]]:
        ear = open_ear()
        events: list[tuple[float, Event]] = []
        texts: list[str] = []
        for at in range(0, len(mic_S), 480):
            for event in ear.hear(mic_S[at : at + 480], rate_hz):
                events.append(((at + 480) / rate_hz, event))
                if event is Event.PAUSE:
                    texts.append((await ear.transcribe()).text)
        await ear.aclose()
        return events, texts

    events, texts = asyncio.run(hear())
    assert [event for _, event in events] == [Event.ONSET, Event.VOICED, Event.PAUSE, Event.WORDS]
    assert texts[-1] == question
    assert 0.15 < events[-1][0] - end_s < 0.5
    assert (fetch_moonshine() / "tokenizer.bin").exists()
