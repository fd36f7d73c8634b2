"""How soon a person in front of a browser hears something, and how soon it is quiet; stage by stage.

    python perf/bench_page.py                      # both rows, three minutes by the clock
    python perf/bench_page.py --only typed --times 40

Headless Chromium against `streamdiff serve` in a process of its own, on this machine. ``typed`` is from the key to the
first sample above 0.01 in the page; ``spoken`` is from the first loud sample of a microphone (a file, read by the
browser, in its own echo cancellation) to the moment at which the page is silent: muted, or without a loud sample for
0.4 s. Waits are by the clock and grow on a busy machine, so load and CPU time are printed beside them. Needs the extras
``avatar``, ``serve``, ``listen`` and ``demo``, and chromium. The last line is one JSON object;
``| python perf/table.py --keep page`` keeps it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine_card, priority

from streamdiff.conversation.mouth import open_mouth
from streamdiff.voice.open import open_voice

TEXTS = (
    "This is a sentence that I would like to hear now.",
    "Hello there.",
    "Can you say this as well?",
    "The train leaves at half past nine.",
    "Good morning, how are you?",
    "Now it is your turn.",
    "Please repeat what I have written.",
    "A short one.",
)
OVER = "Please stop for a moment, I have a question."
LOUD = 0.01
PERIOD_S = 6.0
"""Of the person at the microphone, who says the same again and again: long enough for an answer to have begun."""
FLAGS = [
    "--no-sandbox",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]
ONSETS = """
window.onsets = [];
const get = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = async (wanted) => {
  const stream = await get(wanted);
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  analyser.fftSize = 256;
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(256);
  let loudAt = -1e9;
  setInterval(() => {
    analyser.getFloatTimeDomainData(samples);
    if (!samples.some((x) => Math.abs(x) > 0.01)) return;
    if (performance.now() - loudAt > 2000) window.onsets.push(performance.now());
    loudAt = performance.now();
  }, 4);
  return stream;
};
"""
"""Notes when the microphone becomes loud after two seconds of silence, as the page's own code hears it."""


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    return {f"p{q}": round(float(np.percentile(values, q)), 1) for q in (50, 95)} if values else {}


class Usage:
    """CPU seconds of a process, and how much of the time somebody on this machine waited for a core."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began_s, self._before_s = time.monotonic(), self._seconds()
        self._waited_s = _waited_s()

    def cores(self) -> float:
        """CPU seconds per second since the beginning."""
        return round((self._seconds() - self._before_s) / (time.monotonic() - self._began_s), 3)

    def pressure(self) -> float | None:
        """Share of the time since the beginning in which a task could have run and had no core; None: not known."""
        now_s = _waited_s()
        if now_s is None or self._waited_s is None:
            return None
        return round((now_s - self._waited_s) / (time.monotonic() - self._began_s), 2)

    def _seconds(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _waited_s() -> float | None:
    """Linux's pressure stall information: seconds in which some task waited for a core."""
    try:
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:
        return None
    return int(some.rpartition("=")[2]) / 1e6


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """A server; its address and its process id."""
    command = [sys.executable, "-m", "streamdiff", "serve", "--port", "0", "--capacity", "1", *options]
    log = (folder / "serve.log").open("w")
    with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.match(r"(http://\S+)", process.stdout.readline())
            if found is None:
                raise SystemExit((folder / "serve.log").read_text())
            yield found[1], process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def talking_page(url: str, *flags: str) -> Iterator[Any]:
    """The page, connected."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        raise SystemExit("no browser is installed: apt-get install chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path, headless=True, args=[*FLAGS, *flags])
        page = browser.new_page()
        page.add_init_script(ONSETS)
        page.goto(url)
        page.click("#start")
        until(page, "streamdiff.connections > 0 && streamdiff.ready")
        yield page
        browser.close()


def until(page: Any, expression: str, timeout_s: float = 60.0) -> Any:
    """Wait for something in the page."""
    until_s = time.monotonic() + timeout_s
    while not (value := page.evaluate(expression)):
        if time.monotonic() > until_s:
            raise SystemExit(f"this did not become true in {timeout_s:g} s: {expression}")
        page.wait_for_timeout(20)
    return value


def quiet_ms(text: str) -> float:
    """How long a sentence's sound goes on before it is loud."""
    sound_S = np.concatenate([chunk.samples_S for chunk in open_mouth().speak(text)])
    return float(np.argmax(np.abs(sound_S) > LOUD)) / 24.0


def bench_typed(args: argparse.Namespace) -> dict[str, Any]:
    """Typed text is heard."""
    rng = random.Random(0)
    found: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), "--mind", "none") as (url, pid),
        talking_page(url) as page,
    ):
        page.wait_for_timeout(4_000)
        usage = Usage(pid)
        for number in range(args.times):
            text = TEXTS[number % len(TEXTS)]
            page.evaluate("streamdiff.latencies.length = 0")
            page.fill("#text", text)
            page.press("#text", "Enter")
            until(page, "streamdiff.latencies.some(l => l.stage === 'audible')")
            until(page, "streamdiff.status === 'idle'")
            row = {each["stage"]: each["ms"] for each in page.evaluate("streamdiff.latencies")}
            stats = page.evaluate("streamdiff.stats")
            row |= {"quiet": quiet_ms(text), "jitter buffer": stats["jitter_buffer_ms"]}
            row["way"] = row["audible"] - row["face"] - row["encode"] - row["quiet"]
            for stage, ms in row.items():
                found.setdefault(stage, []).append(ms)
            page.wait_for_timeout(rng.randrange(300, 900))
        page.wait_for_timeout(1_500)
        stats, sync_ms = page.evaluate("[streamdiff.stats, streamdiff.sync_ms]")
        cores, pressure = usage.cores(), usage.pressure()
    return {
        "times": args.times,
        **{stage: percentiles(values) for stage, values in found.items()},
        "server cores": cores,
        "pressure": pressure,
        "concealed": round(stats["concealed"]),
        "dropped": stats["dropped"],
        "freezes": stats["freezes"],
        "audio - video": sync_ms,
    }


def bench_spoken(args: argparse.Namespace) -> dict[str, Any]:
    """A person speaks over the face."""
    silent: list[float] = []
    told: list[float] = []
    with tempfile.TemporaryDirectory() as name, serving(Path(name)) as (url, pid):
        wav = Path(name) / "over.wav"
        over(wav)
        with talking_page(url, f"--use-file-for-fake-audio-capture={wav}") as page:
            page.evaluate(SILENCES)
            page.click("#mic")
            usage = Usage(pid)
            until_s = time.monotonic() + (args.times + 3) * PERIOD_S
            while len(silent) < args.times and time.monotonic() < until_s:
                page.wait_for_timeout(1_000)
                silent, told = spoken_over(*page.evaluate("[onsets, silences, stops]"))
            cores, pressure = usage.cores(), usage.pressure()
    times = {"times": len(silent), "told": percentiles(told), "silent": percentiles(silent)}
    return {**times, "server cores": cores, "pressure": pressure}


SILENCES = """
window.silences = []; window.stops = [];
let wasLoud = false, lastLoud = 0;
setInterval(() => {
  const loud = streamdiff.loud();
  const now = performance.now();
  if (loud) { wasLoud = true; lastLoud = now; }
  else if (wasLoud && now - lastLoud > 400) { wasLoud = false; window.silences.push(lastLoud); }
}, 4);
let seen = 0;
setInterval(() => {
  for (const event of streamdiff.events.slice(seen)) if (event.type === "stopped" && event.segment) {
    window.stops.push(performance.now());
  }
  seen = streamdiff.events.length;
}, 2);
"""


def spoken_over(onsets: list[float], silences: list[float], stops: list[float]) -> tuple[list[float], list[float]]:
    """From each onset over which the face was speaking: until it is silent, and until the server had said stop."""
    silent: list[float] = []
    told: list[float] = []
    for onset in onsets:
        stop = next((at for at in stops if onset < at < onset + 1_500), None)
        last_loud = next((at for at in silences if at > onset), None)
        if stop is not None and last_loud is not None and last_loud < onset + 3_000:
            told.append(stop - onset)
            silent.append(last_loud - onset)
    return silent, told


def over(path: Path) -> None:
    """What the person says, once every `PERIOD_S`."""
    voice = open_voice("heart:pitch=0.8,tract=0.92")
    said_S = np.concatenate([chunk.samples_S for chunk in voice.speak(OVER)])
    line_S = np.zeros(round(PERIOD_S * voice.rate_hz), np.float32)
    line_S[: len(said_S)] = said_S
    line_S += 1e-4 * np.random.default_rng(0).standard_normal(len(line_S)).astype(np.float32)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(voice.rate_hz)
        file.writeframes((np.clip(line_S, -1, 1) * 32_767).astype("<i2").tobytes())


ROWS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"typed": bench_typed, "spoken": bench_spoken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help=f"rows, separated by commas: {','.join(ROWS)}")
    parser.add_argument("--times", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = args.only.split(",") if args.only else list(ROWS)
    if unknown := sorted(set(chosen) - set(ROWS)):
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    report: dict[str, Any] = {
        "bench": "page",
        "card": machine_card(torch.device("cpu")),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "priority": priority(),
    }
    for name in chosen:
        report[name] = ROWS[name](args)
        print(f"{name:>8}  {json.dumps(report[name])}", flush=True)
    report["load after"] = round(os.getloadavg()[0], 2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
