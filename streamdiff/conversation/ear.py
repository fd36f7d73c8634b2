"""The ear of a conversation: sound of a microphone in, what happened out, and what was said when it is asked.

`SpeechEar` is the real one: voice activity, echo gate, end of turn, and a recogniser in one worker thread.
`ScriptedEar` follows a script. `hear` costs about a millisecond per 32 ms of speech and is called on the event loop.

Axes: S waveform samples at 16 kHz.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.conversation.echo import EchoGate
from streamdiff.conversation.endpoint import Endpointer, Patience, meaning
from streamdiff.conversation.recogniser import HostedRecogniser, Moonshine, Recogniser, Whisper
from streamdiff.conversation.turn import Event
from streamdiff.conversation.vad import HOP, HOP_S, RATE_HZ, Silero
from streamdiff.errors import BackendError, ConfigError, StreamdiffError
from streamdiff.stream import Samples
from streamdiff.voice.external import waveform
from streamdiff.voice.resample import Resampler

_PREROLL = 10
"""Hops before the onset that belong to the utterance: the first consonant is quiet."""
_LONGEST = int(120 / HOP_S)
"""Hops of one turn that are kept: two minutes."""
_PARTIAL = 19
"""Hops between two partial transcripts: 0.6 s, or more where they take long."""
_PARTIAL_SHARE = 0.1
"""Largest share of the time that partial transcripts may take: the one at the pause must not wait for them."""
_HUM_SHARE = 0.02
"""Largest share of energy above 1 kHz that a hum has."""


@dataclass(frozen=True, slots=True)
class Understood:
    """A transcript, and what it means if the pause has been long enough for it by now."""

    text: str
    event: Event | None = None


class Ear(Protocol):
    """Hears one person. All calls from one event loop."""

    @property
    def quiet_s(self) -> float:
        """How long nobody has been heard, up to the last sample."""
        ...

    @property
    def is_turn(self) -> bool:
        """Whether a voice was heard of which it is not known yet how it ends."""
        ...

    @property
    def wants_partial(self) -> bool:
        """Whether a partial transcript is due, from a recogniser that is fast enough for them."""
        ...

    def hear(self, samples: Samples, rate_hz: int) -> list[Event]:
        """What these samples, which follow those of the last call, make happen.

        Raises:
            InputError: no waveform, or a rate that is not 8 to 192 kHz.
        """
        ...

    def flush(self) -> list[Event]:
        """No sound comes any more: what happens if silence follows, up to the pause."""
        ...

    def played(self, sound_S: Floats, rate_hz: int, position_s: float) -> None:
        """The face was heard saying this, from this position of its stream on."""
        ...

    def face_speaks(self, speaking: bool) -> None:
        """Whether the face is speaking now."""
        ...

    async def transcribe(self) -> Understood:
        """What was said in this turn so far; cancelling it is how it is dropped.

        Raises:
            BackendError: the recogniser failed.
        """
        ...

    def give_up(self) -> None:
        """This turn was not understood: what was said in it is forgotten."""
        ...

    async def aclose(self) -> None:
        """End its thread; idempotent."""
        ...


class SpeechEar:
    """Voice activity by Silero, an echo gate, and a recogniser.

    Args:
        recogniser: shared by as many ears as there are people.
        silero: of another ear, to share its network; None: the packaged one.
        patience: how long things must last.
    """

    def __init__(
        self, recogniser: Recogniser, *, silero: Silero | None = None, patience: Patience | None = None
    ) -> None:
        self._recogniser = recogniser
        self._silero = Silero(silero.network if silero is not None else None)
        self._gate = EchoGate()
        self._endpointer = Endpointer(patience)
        self._patience = patience
        self._rest_S = np.zeros(0, np.float32)
        self._hops: deque[Floats] = deque(maxlen=_PREROLL)
        self._resamplers: dict[str, tuple[int, Resampler]] = {}
        self._face_speaks = False
        self._since_partial = 0
        self._took_s = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="streamdiff-ear")

    def another(self) -> SpeechEar:
        """An ear for another person, with the same networks."""
        return SpeechEar(self._recogniser, silero=self._silero, patience=self._patience)

    @property
    def quiet_s(self) -> float:
        """See `Ear`."""
        return self._endpointer.num_quiet * HOP_S + len(self._rest_S) / RATE_HZ

    @property
    def is_turn(self) -> bool:
        """See `Ear`."""
        return self._endpointer.is_turn or self._endpointer.is_candidate

    @property
    def wants_partial(self) -> bool:
        """See `Ear`."""
        due = self._recogniser.is_fast and self._endpointer.is_turn and not self._endpointer.is_paused
        return due and self._since_partial >= max(_PARTIAL, self._took_s / HOP_S / _PARTIAL_SHARE)

    def hear(self, samples: Samples, rate_hz: int) -> list[Event]:
        """See `Ear`."""
        sound_S = self._resampled(
            "heard", waveform(samples if isinstance(samples, bytes) else np.asarray(samples)), rate_hz
        )
        self._rest_S = np.concatenate([self._rest_S, sound_S])
        events: list[Event] = []
        while len(self._rest_S) >= HOP:
            hop_S, self._rest_S = self._rest_S[:HOP], self._rest_S[HOP:]
            event = self._hop(hop_S)
            events += [event] if event is not None else []
        return events

    def _hop(self, hop_S: Floats) -> Event | None:
        self._hops.append(hop_S)
        self._since_partial += 1
        probability = self._silero.probability(hop_S)
        if self._gate.is_echo(hop_S, unlikely=probability < 0.2):
            probability = 0.0
        event = self._endpointer.push(probability, is_hum=_is_hum(hop_S), face_speaks=self._face_speaks)
        if event is Event.ONSET:
            self._hops = deque(self._hops, maxlen=_LONGEST)
            self._since_partial = 0
        elif event in (Event.HUSH, Event.WORDS, Event.BACKCHANNEL, Event.NOTHING):
            self._hops = deque(self._hops, maxlen=_PREROLL)
        return event

    def flush(self) -> list[Event]:
        """See `Ear`."""
        self._gate.restart()
        return self.hear(np.zeros(HOP * 8, np.float32), RATE_HZ)

    def played(self, sound_S: Floats, rate_hz: int, position_s: float) -> None:
        """See `Ear`."""
        self._gate.played(self._resampled("played", sound_S, rate_hz), position_s)

    def _resampled(self, which: str, sound_S: Floats, rate_hz: int) -> Floats:
        if which not in self._resamplers or self._resamplers[which][0] != rate_hz:
            self._resamplers[which] = rate_hz, Resampler(rate_hz, RATE_HZ)
        return self._resamplers[which][1].push(sound_S)

    def face_speaks(self, speaking: bool) -> None:
        """See `Ear`."""
        self._face_speaks = speaking

    async def transcribe(self) -> Understood:
        """See `Ear`."""
        self._since_partial = 0
        sound_S = np.concatenate([np.zeros(0, np.float32), *self._hops])
        dropped = threading.Event()
        began_s = time.monotonic()
        try:
            text = await asyncio.get_running_loop().run_in_executor(
                self._pool, self._recogniser.transcribe, sound_S, dropped.is_set
            )
        except StreamdiffError:
            raise
        except Exception as error:
            raise BackendError(f"{self._recogniser.name} failed: {error}; see the log, or open another ear") from error
        finally:
            dropped.set()
        self._took_s = time.monotonic() - began_s
        event = self._endpointer.transcribed(text)
        if event is not None:
            self._hops = deque(self._hops, maxlen=_PREROLL)
        return Understood(text, event)

    def give_up(self) -> None:
        """See `Ear`."""
        self._endpointer.reset()
        self._hops = deque(self._hops, maxlen=_PREROLL)

    async def aclose(self) -> None:
        """See `Ear`; waits for a transcription that is under way, which ends at its next word."""
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)


def _is_hum(hop_S: Floats) -> bool:
    """Whether a hop sounds like "mm": next to nothing above 1 kHz."""
    power = np.square(np.abs(np.fft.rfft(hop_S * np.hanning(HOP))))
    return float(power[HOP * 1000 // RATE_HZ :].sum()) <= _HUM_SHARE * float(power[2:].sum())


class ScriptedEar:
    """An ear that follows a script, for tests and for trying a conversation without a microphone.

    Args:
        script: for each call of `hear`, what happens.
        texts: what each transcription understands, in order; an error is raised.
        takes_s: how long a transcription takes.
    """

    wants_partial = False

    def __init__(
        self, script: Iterable[Iterable[Event]], texts: Iterable[str | StreamdiffError], *, takes_s: float = 0.0
    ) -> None:
        self._script = iter(script)
        self._texts = iter(texts)
        self._takes_s = takes_s
        self.is_turn = False
        self.quiet_s = 0.0
        self.is_closed = False
        self.heard_face: list[tuple[float, int]] = []
        """Position and samples of what the face was heard saying."""

    def hear(self, samples: Samples, rate_hz: int) -> list[Event]:
        """The next line of the script; nothing after its end."""
        del samples, rate_hz
        return list(next(self._script, ()))

    def flush(self) -> list[Event]:
        """Nothing."""
        return []

    def played(self, sound_S: Floats, rate_hz: int, position_s: float) -> None:
        """Note it in `heard_face`."""
        del rate_hz
        self.heard_face.append((position_s, len(sound_S)))

    def face_speaks(self, speaking: bool) -> None:
        """Ignored."""

    async def transcribe(self) -> Understood:
        """The next text."""
        text = next(self._texts)
        await asyncio.sleep(self._takes_s)
        if isinstance(text, StreamdiffError):
            raise text
        return Understood(text, meaning(text))

    def give_up(self) -> None:
        """Nothing to forget."""

    async def aclose(self) -> None:
        """Note that it was closed."""
        self.is_closed = True


def open_ear(name: str = "moonshine", *, model: str = "whisper-1", api_key: str = "") -> SpeechEar:
    """An ear by the name that a command line gives; loads networks, which takes a second (and a download once).

    ``moonshine`` (English, 0.1 s an utterance on one core), ``whisper`` (English, a second), or the base URL of an
    OpenAI-compatible endpoint, for which ``model`` and ``api_key`` are. For another person take `SpeechEar.another`.

    Raises:
        ConfigError: a name that is none of these.
        BackendError: a package is missing; it names the extra.
        InputError: weights cannot be fetched.
    """
    if name.startswith(("http://", "https://")):
        return SpeechEar(HostedRecogniser(name, model=model, api_key=api_key))
    if name == "moonshine":
        return SpeechEar(Moonshine())
    if name == "whisper":
        return SpeechEar(Whisper())
    raise ConfigError(f"an ear is moonshine, whisper, or the URL of an OpenAI-compatible endpoint, got {name!r}")
