"""Words to sound, with the time of every phoneme; and sound from outside, through the same door.

A `Synthesizer` turns text, or text that is still being written, into `SpeechChunk`s. Sentences are cut
early, so that the first words are heard while the rest is still text. `HibariVoice` (7.9 MB, weights inside
its wheel) is the default; `KokoroVoice` runs Kokoro-82M when its files are there. `ExternalAudio` brings a
microphone or another voice, at any rate and in blocks of any size, to the same rate and the same chunks.

Axes: S waveform samples, P phonemes of a sentence, V voices.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from streamdiff import rng
from streamdiff.arrays import Floats
from streamdiff.errors import BackendError, CheckpointError, ConfigError, InputError

logger = logging.getLogger(__name__)

RATE_HZ = 24_000
"""Rate of all sound inside the coefficient path: 960 samples to a frame of 25 per second."""

_UNIT_S = 0.025
"""Kokoro, and hibari after it, count durations in 25 ms."""
_EARLY_UNITS = 2
"""The sound of a phoneme comes about 50 ms before the place that the durations give it: vowels correlate
with loudness best at -45 ms, hisses with high frequencies at -60 ms (40 sentences)."""
_LEAD_S = 0.03
_STRESS = frozenset("ˈˌ")
PAUSES = frozenset({"", *';:,.!?—…"()“”'})
_LENGTH = frozenset("ːʰʲ̃")


class Phoneme(NamedTuple):
    """A sound of speech and when it is heard, in seconds from the start of its chunk.

    ``symbol`` is one character of the Kokoro alphabet (IPA, with ``A I O Q W Y`` for diphthongs) or
    punctuation; ``""`` is the silence at the ends.
    """

    symbol: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class SpeechChunk:
    """A stretch of one utterance. The last chunk of an utterance may hold no sound at all."""

    samples_S: Floats
    rate_hz: int
    phonemes: tuple[Phoneme, ...] | None
    """None: nobody knows what is being said (sound from outside)."""
    segment: int = 0
    last: bool = False

    @property
    def duration_s(self) -> float:
        return len(self.samples_S) / self.rate_hz


class Synthesizer(Protocol):
    """A voice. Thread-safe; stop it by no longer asking for chunks."""

    @property
    def rate_hz(self) -> int: ...

    def speak(self, text: str | Iterable[str], *, segment: int = 0) -> Iterator[SpeechChunk]:
        """Chunks of speech in order; the last one has ``last`` set.

        Raises:
            InputError: a text without a word that this voice can say, found at the call or, for text still
                being written, at its end.
        """
        ...


_TITLES = frozenset(
    ["mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "no", "vol", "fig", "e.g", "i.e", "gen", "rev"]
)
_SENTENCE_END = re.compile(r"""(?:[.!?…]+["'”’)\]]*(?=\s)|[。！？]|\n)""")  # noqa: RUF001
_CLAUSE_END = re.compile(r"""(?:[,;:]["'”’)\]]*(?=\s)|[—–](?=\s|\w)|[，；：、])""")  # noqa: RUF001
_LAST_WORD = re.compile(r"([\w.]+)\.$")

_LONGEST = 240
_LONG_SENTENCE = 80
_SHORTEST_FIRST = 10
_PIECE = 4096


def sentences(text: str | Iterable[str]) -> Iterator[str]:
    """Cut text into pieces to be spoken in one breath, each as soon as it is complete.

    The first piece may end at a comma, so that a voice can begin; later ones end with a sentence. No piece
    is longer than 240 characters and no more than that (and one piece of input) is held back.

    >>> list(sentences(["Well, I ", "think so. Dr. Who", " agrees. Yes"]))
    ['Well, I think so.', 'Dr. Who agrees.', 'Yes']
    """
    held, first = "", True
    for piece in _pieces(text):
        held += piece
        while (end := _cut(held, first=first, final=False)) is not None:
            sentence, held = held[:end].strip(), held[end:]
            if sentence:
                yield sentence
                first = False
    while held.strip():
        end = _cut(held, first=first, final=True) or len(held)
        sentence, held = held[:end].strip(), held[end:]
        if sentence:
            yield sentence
            first = False


def _pieces(text: str | Iterable[str]) -> Iterator[str]:
    # A whole text is known to be complete: the line end says that its only sentence need not be cut at a comma.
    for part in [text + "\n"] if isinstance(text, str) else text:
        for start in range(0, len(part), _PIECE):
            yield part[start : start + _PIECE]


def _cut(held: str, *, first: bool, final: bool) -> int | None:
    """Length of the next piece, or None while it is not decided."""
    sentence = next((m.end() for m in _SENTENCE_END.finditer(held) if _ends_a_sentence(held, m)), None)
    if sentence is None and final and len(held) <= _LONGEST:
        sentence = len(held)
    if first and (sentence is None or sentence > _LONG_SENTENCE):
        clause = next((m.end() for m in _CLAUSE_END.finditer(held) if m.end() >= _SHORTEST_FIRST), None)
        if clause is not None and clause <= _LONGEST:
            return clause
    if sentence is not None and sentence <= _LONGEST:
        return sentence
    if len(held) <= _LONGEST:
        return None
    window = held[:_LONGEST]
    clauses = [m.end() for m in _CLAUSE_END.finditer(window)]
    if clauses and clauses[-1] > _LONGEST // 4:
        return clauses[-1]
    space = window.rfind(" ")
    return space + 1 if space > 0 else _LONGEST


def _ends_a_sentence(held: str, match: re.Match[str]) -> bool:
    if match.group()[0] != ".":
        return True
    word = _LAST_WORD.search(held[max(0, match.start() - 16) : match.start() + 1])
    if word is None:
        return True
    name = word.group(1)
    if "." in name:
        # "5 p.m. now", but "at 5 p.m. Then": what follows decides.
        return held[match.end() :].lstrip()[:1].isupper()
    initial = len(name) == 1 and name.isupper() and name != "I"
    return not (initial or name.lower() in _TITLES)


def _onnx_with_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """The same ONNX model with further values of its graph as outputs.

    Protocol buffers merge a message field that occurs twice, so a few bytes at the end do it: field 7 of
    the model is the graph, field 12 of the graph an output, field 1 of the output its name.
    """
    for name in names:
        output = _field(12, _field(1, name.encode()))
        model = model + _field(7, output)
    return model


def _field(number: int, payload: bytes) -> bytes:
    size, length = bytearray(), len(payload)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    size.append(length)
    return bytes([number << 3 | 2]) + bytes(size) + payload


def _session(model: bytes, num_threads: int) -> Any:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads steal the core that the renderer needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _import(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(
            f"the voice needs the package {name.partition('.')[0]!r}, which is not installed; "
            "run: pip install 'streamdiff[avatar]'"
        ) from error


def _timed(symbols: str, durations_P: NDArray[np.integer[Any]]) -> list[Phoneme]:
    """Symbols between two silences as phonemes.

    Marks of stress and length join their vowel, and a space the sound that follows it: the network gives
    them time of their own, but a word's first consonant fills the space before it (measured on /s/ and /ʃ/).
    """
    durations_P = durations_P.copy()
    lead = min(_EARLY_UNITS, int(durations_P[0]))
    durations_P[0] -= lead
    durations_P[-1] += lead
    ends_s = np.cumsum(durations_P) * _UNIT_S
    starts_s = ends_s - durations_P * _UNIT_S
    phonemes: list[Phoneme] = []
    begun_s: float | None = None
    for symbol, start_s, end_s in zip(["", *symbols, ""], starts_s.tolist(), ends_s.tolist(), strict=True):
        pausing = bool(phonemes) and phonemes[-1].symbol in PAUSES
        if symbol and (symbol in _STRESS or (symbol == " " and not pausing)):
            begun_s = start_s if begun_s is None else begun_s
        elif symbol and phonemes and (symbol in _LENGTH or symbol == " "):
            phonemes[-1] = phonemes[-1]._replace(end_s=end_s)
        else:
            phonemes.append(Phoneme(symbol, start_s if begun_s is None else begun_s, end_s))
            begun_s = None
    return phonemes


def _without_lead(samples_S: Floats, phonemes: list[Phoneme], rate_hz: int) -> tuple[Floats, list[Phoneme]]:
    """Cut the silence before the first sound to 30 ms: nobody wants to wait for nothing."""
    window = rate_hz // 200
    first_end = int(phonemes[0].end_s * rate_hz) if phonemes else len(samples_S)
    loud_B = np.abs(samples_S[: len(samples_S) // window * window]).reshape(-1, window).max(axis=1)
    threshold = 0.02 * float(loud_B.max(initial=0.0))
    onset = min(int(np.argmax(loud_B > threshold)) * window, first_end)
    cut = max(0, onset - int(_LEAD_S * rate_hz))
    cut_s = cut / rate_hz
    moved = [Phoneme(p.symbol, max(0.0, p.start_s - cut_s), max(0.0, p.end_s - cut_s)) for p in phonemes]
    return samples_S[cut:], moved


@dataclass
class _Reader:
    """Text to phonemes of the Kokoro alphabet, by the rules and the lexica inside hibari's wheel."""

    british: bool = False
    _g2p: Callable[[str], str] = field(init=False)
    vocabulary: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        hibari = _import("hibari")
        self._g2p = _import("hibari.g2p").G2P(british=self.british)
        path = Path(str(hibari.__file__)).parent / "assets" / "vocab.json"
        self.vocabulary = json.loads(path.read_text(encoding="utf-8"))

    def phonemes(self, sentence: str) -> str:
        sentence = _LONG_NUMBER.sub(_in_threes, sentence)
        try:
            read = self._g2p(sentence)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            # Its rules stumble over some strings that are no language; one sentence must not end the talk.
            logger.warning("not spoken, cannot be read (%s): %s", error, _shown(sentence))
            return ""
        return "".join(c for c in read if c in self.vocabulary)


_LONG_NUMBER = re.compile(r"\d{13,}")


def _in_threes(match: re.Match[str]) -> str:
    digits = match.group()
    return " ".join(digits[i : i + 3] for i in range(0, len(digits), 3))


_MAX_PHONEMES = 400


def _breaths(phonemes: str) -> Iterator[str]:
    """At most 400 phonemes at a time, cut between words where there are words."""
    while len(phonemes) > _MAX_PHONEMES:
        cut = phonemes.rfind(" ", 1, _MAX_PHONEMES)
        cut = cut if cut > 0 else _MAX_PHONEMES
        yield phonemes[:cut]
        phonemes = phonemes[cut:].lstrip()
    if any(c.isalpha() for c in phonemes):
        yield phonemes


class _Speaker:
    """What the two voices share: sentences, phonemes, chunks."""

    rate_hz = RATE_HZ

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def phonemes(self, sentence: str) -> str:
        """Phonemes of one sentence, as the voice will say it; empty when it cannot say any of it."""
        return self._reader.phonemes(sentence)

    def say_phonemes(self, phonemes: str, *, breath: int = 0) -> tuple[Floats, tuple[Phoneme, ...]]:
        """The sound ``[S]`` of a phoneme string and the times of its phonemes."""
        raise NotImplementedError

    def speak(self, text: str | Iterable[str], *, segment: int = 0) -> Iterator[SpeechChunk]:
        """Chunks of speech, one per sentence, then an empty one that is ``last``; see `Synthesizer`."""
        if isinstance(text, str) and not any(c.isalnum() for c in text):
            raise InputError(f"nothing to say in {_shown(text)}: it holds no letter and no digit; give words")
        return self._chunks(text, segment)

    def _chunks(self, text: str | Iterable[str], segment: int) -> Iterator[SpeechChunk]:
        breath = 0
        unread = ""
        for sentence in sentences(text):
            phonemes = self.phonemes(sentence)
            if not any(c.isalpha() for c in phonemes):
                unread = unread or sentence
                logger.info("not spoken, no phonemes for it: %s", _shown(sentence))
                continue
            for part in _breaths(phonemes):
                samples_S, timed = self.say_phonemes(part, breath=breath)
                yield SpeechChunk(samples_S, self.rate_hz, timed, segment)
                breath += 1
        if breath == 0:
            raise InputError(
                f"nothing to say in {_shown(unread)}: this voice knows no phoneme of it; give English words"
            )
        yield SpeechChunk(np.zeros(0, np.float32), self.rate_hz, (), segment, last=True)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


class HibariVoice(_Speaker):
    """English speech in milliseconds on one CPU thread (hibari-tts 0.2.1, distilled from Kokoro; Apache-2.0).

    The same text gives the same samples, whatever was said before.

    Args:
        voice: a name of ``hibari.voices.VOICES``. "heart" is inside the wheel; hibari fetches others once.
        speed: 0.5 (slow) .. 2.
        pitch: factor on the fundamental frequency, 0.4..2.5.
        tract: factor on the formants, 0.7..1.4; below 1 sounds like a longer throat.
        seed: of the breath noise.
        num_threads: of the network.

    Raises:
        BackendError: hibari-tts is not installed, or a voice cannot be fetched.
        ConfigError: an unknown voice or a factor out of range.
    """

    def __init__(
        self,
        voice: str = "heart",
        *,
        speed: float = 1.0,
        pitch: float = 1.0,
        tract: float = 1.0,
        seed: int = 0,
        num_threads: int = 1,
    ) -> None:
        for name, value, low, high in (
            ("speed", speed, 0.5, 2.0),
            ("pitch", pitch, 0.4, 2.5),
            ("tract", tract, 0.7, 1.4),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} of a voice must lie in {low}..{high}, got {value}")
        voices = _import("hibari.voices")
        if voice not in voices.VOICES:
            raise ConfigError(f"no voice {voice!r}; hibari has {', '.join(voices.VOICES)}")
        super().__init__(_Reader(british=bool(voices.VOICES[voice]["british"])))
        self._dsp = _import("hibari.dsp")
        self.speed, self.pitch, self.tract, self.seed = speed, pitch, tract, seed
        try:
            model = Path(voices.voice_path(voice)).read_bytes()
        except (OSError, RuntimeError, ValueError) as error:
            raise BackendError(f"the voice {voice!r} cannot be fetched: {error}; use 'heart'") from error
        self._session = _session(_onnx_with_outputs(model, ["/Clip_output_0"]), num_threads)
        # The lexica, the net for unknown words and the network's own buffers are made on first use: a third
        # of a second that no listener should hear.
        for text in ("Warm up with a zorbnik, please.", "Go!"):
            for _ in self.speak(text):
                pass

    def say_phonemes(self, phonemes: str, *, breath: int = 0) -> tuple[Floats, tuple[Phoneme, ...]]:
        """The sound ``[S]`` of a phoneme string (at most 400 symbols) and the times of its phonemes."""
        vocabulary = self._reader.vocabulary
        ids = [0, *(vocabulary[c] for c in phonemes), 0]
        speed = np.full(1, self.speed, np.float32)
        *spectra, durations_P = self._session.run(None, {"ids": np.asarray([ids], np.int64), "speed": speed})
        harmonic, phase, noise, residual, residual_phase, pitch_hz = (value[0] for value in spectra)
        if self.pitch != 1.0:
            pitch_hz = pitch_hz * np.float32(self.pitch)
        if self.tract != 1.0:
            harmonic, phase, noise, residual, residual_phase = (
                _stretched(x, self.tract) for x in (harmonic, phase, noise, residual, residual_phase)
            )
        generator = np.random.default_rng(rng.seed_of("voice", self.seed, breath, phonemes))
        samples_S = self._dsp.synth(harmonic, phase, noise, residual, residual_phase, pitch_hz, generator)
        timed = _timed(phonemes, np.rint(durations_P).astype(np.int64).reshape(-1))
        samples_S, timed = _without_lead(samples_S.astype(np.float32, copy=False), timed, RATE_HZ)
        return np.ascontiguousarray(samples_S), tuple(timed)


def _stretched(spectrum: Floats, factor: float) -> Floats:
    """Move formants: bin k of the result is bin k / factor of the spectrum ``[bins, time]``."""
    num_bins = spectrum.shape[0]
    source = np.minimum(np.rint(np.arange(num_bins) / factor).astype(np.int64), num_bins - 1)
    return spectrum[source]


class KokoroVoice(_Speaker):
    """Kokoro-82M (StyleTTS 2 with an ISTFT decoder; Apache-2.0) from an ONNX export and a file of styles.

    One style vector of 256 numbers carries two halves: 0..127 timbre (read by the decoder), 128..255
    prosody (read by the predictor of durations, pitch and energy).

    Args:
        model_path: ``*.onnx`` with inputs ``tokens`` or ``input_ids``, ``style [1, 256]`` and ``speed``.
        voices_path: ``*.npz`` with one array ``[510, 1, 256]`` per voice, or a ``*.bin`` of one voice.
        voice: its name inside the ``npz``; None: the first.
        timbre: 128 numbers that replace the timbre half (see `fit_timbre`).

    Raises:
        InputError: a file that is not there.
        CheckpointError: a file that is not what it should be.
    """

    def __init__(
        self,
        model_path: str | Path,
        voices_path: str | Path,
        *,
        voice: str | None = None,
        speed: float = 1.0,
        timbre: Floats | None = None,
        british: bool = False,
        num_threads: int = 1,
    ) -> None:
        for path in (model_path, voices_path):
            if not Path(path).is_file():
                raise InputError(f"Kokoro needs {path}, and there is no such file; check the path")
        super().__init__(_Reader(british=british))
        self.speed = speed
        self.styles_P256 = kokoro_styles(voices_path, voice)
        self.timbre = None if timbre is None else _checked_timbre(timbre)
        model = Path(model_path).read_bytes()
        self._session, self._has_durations = _kokoro_session(model, num_threads)
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._tokens = next((name for name in ("tokens", "input_ids") if name in inputs), "")
        if not self._tokens or not {"style", "speed"} <= set(inputs):
            raise CheckpointError(
                f"{model_path} is not a Kokoro export: it reads {sorted(inputs)}, not tokens, style and speed"
            )
        self._speed_type = np.int32 if "int32" in inputs["speed"].type else np.float32
        self._reader.phonemes("Warm up with a zorbnik, please.")

    @property
    def has_durations(self) -> bool:
        """Whether the export lets the times of phonemes out."""
        return self._has_durations

    def say_phonemes(self, phonemes: str, *, breath: int = 0) -> tuple[Floats, tuple[Phoneme, ...]]:
        """The sound ``[S]`` of a phoneme string and its times; none when the export hides durations."""
        del breath
        vocabulary = self._reader.vocabulary
        ids = np.asarray([[0, *(vocabulary[c] for c in phonemes), 0]], np.int64)
        style_1D = self.styles_P256[min(len(phonemes), len(self.styles_P256) - 1)][None].copy()
        if self.timbre is not None:
            style_1D[0, :128] = self.timbre
        speed = np.full(1, self.speed, self._speed_type)
        samples, *rest = self._session.run(None, {self._tokens: ids, "style": style_1D, "speed": speed})
        samples_S = np.asarray(samples, np.float32).reshape(-1)
        if not self._has_durations:
            return samples_S, ()
        durations_P = np.rint(np.asarray(rest[-1], np.float64)).astype(np.int64).reshape(-1)
        timed = _timed(phonemes, durations_P)
        samples_S, timed = _without_lead(samples_S, timed, RATE_HZ)
        return np.ascontiguousarray(samples_S), tuple(timed)

    def _chunks(self, text: str | Iterable[str], segment: int) -> Iterator[SpeechChunk]:
        for chunk in super()._chunks(text, segment):
            unknown = not self._has_durations and len(chunk.samples_S) > 0
            yield SpeechChunk(chunk.samples_S, chunk.rate_hz, None, segment) if unknown else chunk


def _kokoro_session(model: bytes, num_threads: int) -> tuple[Any, bool]:
    """A session that also gives the durations: a rounded value with one number per token."""
    found = {m.decode() for m in re.findall(rb"/[\w/.]*(?:Round|Clip)(?:_\d+)?_output_0", model)}
    for name in sorted(found, key=lambda n: ("Round" not in n, len(n))):
        try:
            session = _session(_onnx_with_outputs(model, [name]), num_threads)
        except Exception as error:  # noqa: BLE001  onnxruntime has no error class of its own for a bad graph
            logger.debug("no output %s: %s", name, error)
            continue
        if _gives_one_number_per_token(session):
            return session, True
    try:
        return _session(model, num_threads), False
    except Exception as error:
        raise CheckpointError(f"the Kokoro model cannot be loaded: {error}; export it again") from error


def _gives_one_number_per_token(session: Any) -> bool:
    inputs = {value.name: value for value in session.get_inputs()}
    tokens = next((name for name in ("tokens", "input_ids") if name in inputs), None)
    if tokens is None or "speed" not in inputs:
        return False
    speed_type = np.int32 if "int32" in inputs["speed"].type else np.float32
    ids = np.asarray([[0, 50, 83, 54, 31, 0]], np.int64)
    feed = {tokens: ids, "style": np.zeros((1, 256), np.float32), "speed": np.ones(1, speed_type)}
    durations = np.asarray(session.run(None, feed)[-1]).reshape(-1)
    return durations.size == ids.size and float(durations.min()) >= 1


def kokoro_names(path: str | Path) -> list[str]:
    """The voices in a file of Kokoro styles; errors as `kokoro_styles`."""
    path = Path(path)
    if path.suffix != ".npz":
        return [path.stem]
    try:
        with np.load(path) as voices:
            return list(voices.files)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a file of Kokoro styles: {error}") from error


def kokoro_styles(path: str | Path, voice: str | None = None) -> Floats:
    """The styles ``[P, 256]`` of one voice, by the number of its phonemes; None: the first voice.

    Raises:
        ConfigError: no such voice in the file.
        CheckpointError: no file of styles.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path) as voices:
                name = voice if voice is not None else voices.files[0]
                if name not in voices.files:
                    raise ConfigError(f"no voice {name!r} in {path}; it holds {', '.join(voices.files)}")
                styles = voices[name]
        else:
            styles = np.fromfile(path, np.float32)
        return np.ascontiguousarray(styles, np.float32).reshape(-1, 256)
    except ConfigError:
        raise
    except (ValueError, OSError, IndexError) as error:
        raise CheckpointError(f"{path} is not a file of Kokoro styles: {error}") from error


def _checked_timbre(timbre: Floats) -> Floats:
    if timbre.shape != (128,) or not np.isfinite(timbre).all():
        raise ConfigError(f"a timbre is 128 finite numbers, got shape {timbre.shape}")
    return timbre.astype(np.float32)


def open_voice(name: str = "heart") -> Synthesizer:
    """A voice by the name that a command line gives.

    ``heart`` or another hibari voice, with factors after a colon (``heart:pitch=0.8,tract=0.9,speed=1.1``);
    or ``kokoro:MODEL.onnx:VOICES[:NAME]``.

    Raises:
        ConfigError: a name that is none of these.
        InputError: a file of Kokoro that is not there.
        BackendError: the voice's package is not installed.
    """
    kind, _, rest = name.partition(":")
    if kind == "kokoro":
        model_path, _, voices = rest.partition(":")
        voices_path, _, voice = voices.partition(":")
        if not model_path or not voices_path:
            raise ConfigError(f"a Kokoro voice is written kokoro:MODEL.onnx:VOICES[:NAME], got {name!r}")
        return KokoroVoice(model_path, voices_path, voice=voice or None)
    factors = {"speed": 1.0, "pitch": 1.0, "tract": 1.0}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        try:
            factors[key.strip()] = float(value)
        except ValueError:
            factors[key.strip()] = math.nan
    if len(factors) != 3 or not all(map(math.isfinite, factors.values())):
        raise ConfigError(f"factors of a voice are speed, pitch and tract with numbers, got {rest!r}")
    return HibariVoice(kind, speed=factors["speed"], pitch=factors["pitch"], tract=factors["tract"])


class Resampler:
    """Change the rate of a mono stream; the result does not depend on how the stream was cut into blocks.

    Every output sample is a fixed sum over its neighbours (windowed sinc, phases by integer arithmetic), in
    float64, so that nothing drifts and equal streams give equal bits. The filter has no delay; it looks
    ahead 16 samples of the lower rate, less than 2 ms.
    """

    _ZERO_CROSSINGS = 16

    def __init__(self, source_hz: int, rate_hz: int = RATE_HZ) -> None:
        if not 8_000 <= source_hz <= 192_000:
            raise InputError(f"sound must come at 8000..192000 Hz, got {source_hz}; resample it first")
        common = math.gcd(source_hz, rate_hz)
        self._up, self._down = rate_hz // common, source_hz // common
        cutoff = min(1.0, rate_hz / source_hz) * 0.95
        self._half = math.ceil(self._ZERO_CROSSINGS * max(1.0, source_hz / rate_hz))
        offsets = np.arange(-self._half + 1, self._half + 1, dtype=np.float64)
        shifts = np.arange(self._up, dtype=np.float64)[:, None] / self._up
        at = offsets[None, :] - shifts
        window = np.where(np.abs(at) < self._half, 0.5 + 0.5 * np.cos(np.pi * at / self._half), 0.0)
        taps = cutoff * np.sinc(cutoff * at) * window
        self._taps = taps / taps.sum(axis=1, keepdims=True)
        self._held_S = np.zeros(self._half - 1, np.float64)
        self._position = 0

    def push(self, samples_S: NDArray[np.floating[Any]]) -> Floats:
        """The output samples that these input samples complete."""
        if self._up == self._down:
            return np.asarray(samples_S, np.float32)
        held_S = np.concatenate([self._held_S, samples_S.astype(np.float64)])
        # Output m sits at input position m * down / up; its first tap lies half - 1 samples earlier, where
        # held begins.
        reach = len(held_S) - 2 * self._half + 1
        num_out = max(0, -(-(reach * self._up - self._position) // self._down))
        at = self._position + self._down * np.arange(num_out, dtype=np.int64)
        start, phase = at // self._up, at % self._up
        view = np.lib.stride_tricks.sliding_window_view(held_S, 2 * self._half) if num_out else None
        out_S = np.zeros(0) if view is None else (view[start] * self._taps[phase]).sum(axis=1)
        self._position += self._down * num_out
        drop = min(self._position // self._up, len(held_S))
        self._held_S = held_S[drop:]
        self._position -= drop * self._up
        return out_S.astype(np.float32)

    def finish(self) -> Floats:
        """The rest, as if silence followed; the stream begins anew afterwards."""
        if self._up == self._down:
            return np.zeros(0, np.float32)
        out_S = self.push(np.zeros(self._half, np.float64))
        self._held_S = np.zeros(self._half - 1, np.float64)
        self._position = 0
        return out_S


class ExternalAudio:
    """Sound from a microphone or another voice: any rate, any block size, int16 or float, mono or not.

    `push` returns chunks at 24 kHz as soon as they are complete; a change of rate in the middle finishes
    what came before. Not thread-safe: one producer.
    """

    def __init__(self, *, segment: int = 0) -> None:
        self.segment = segment
        self._source_hz: int | None = None
        self._resampler: Resampler | None = None

    @property
    def rate_hz(self) -> int:
        """Rate of what was pushed last."""
        return self._source_hz or RATE_HZ

    def push(self, samples: NDArray[Any] | bytes, rate_hz: int, *, last: bool = False) -> SpeechChunk:
        """Accept ``[S]`` or ``[S, channels]`` (bytes: int16 little endian) and return what it completes.

        Raises:
            InputError: not a waveform, not finite, floats far outside -1..1, or a rate outside 8..192 kHz.
        """
        mono_S = waveform(samples)
        before_S = np.zeros(0, np.float32)
        if self._resampler is None or rate_hz != self._source_hz:
            fresh = Resampler(rate_hz)
            if self._resampler is not None:
                before_S = self._resampler.finish()
            self._resampler, self._source_hz = fresh, rate_hz
        parts = [before_S, self._resampler.push(mono_S)]
        if last:
            parts.append(self._resampler.finish())
            self._resampler = None
        return SpeechChunk(np.concatenate(parts), RATE_HZ, None, self.segment, last)


def waveform(samples: NDArray[Any] | bytes) -> Floats:
    """Mono float32 samples in -1..1 from integers or floats, ``[S]`` or ``[S, channels]``.

    Raises:
        InputError: see `ExternalAudio.push`.
    """
    if isinstance(samples, bytes | bytearray | memoryview):
        raw = bytes(samples)
        if len(raw) % 2:
            raise InputError(f"bytes of sound are int16, two to a sample, got {len(raw)} bytes; cut between samples")
        samples = np.frombuffer(raw, "<i2")
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 1 <= samples.shape[1] <= 32):
        raise InputError(f"sound is [samples] or [samples, channels], got shape {samples.shape}")
    if np.issubdtype(samples.dtype, np.signedinteger) and samples.dtype.itemsize <= 4:
        values = samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
    elif samples.dtype == np.uint8:
        values = (samples.astype(np.float64) - 128) / 128
    elif np.issubdtype(samples.dtype, np.floating):
        values = samples.astype(np.float64)
    else:
        raise InputError(f"samples are int16, int32, uint8 or float, got {samples.dtype}; convert them")
    mono_S = values.mean(axis=1) if values.ndim == 2 else values
    if mono_S.size and not np.isfinite(mono_S).all():
        raise InputError("the sound holds NaN or infinity; check the microphone or the decoder")
    loudest = float(np.abs(mono_S).max(initial=0.0))
    if loudest > 16.0:
        raise InputError(f"floating samples lie in -1..1, got a peak of {loudest:.0f}; divide them (int16: by 32768)")
    return np.clip(mono_S, -1.0, 1.0).astype(np.float32)
