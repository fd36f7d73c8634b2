"""Input features of each frame of motion: log-mel spectrum, phonemes, state of the avatar.

`Cues.rows` lays it out as the motion model reads it, with an intent (`streamdiff.avatar.intent`) at the end.

Axes: A frames, F mel values of a frame, P phoneme classes of a frame, S waveform samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.avatar.intent import NUM_INTENT
from streamdiff.avatar.kinematics import FPS
from streamdiff.errors import InputError
from streamdiff.media.mel import mel_bank
from streamdiff.voice import PAUSES, RATE_HZ, Phoneme

FRAME_SAMPLES = RATE_HZ // FPS
"""Samples of sound that belong to one frame: 960."""
PHONES = ("", "other", " ", "pause", *"ɑæʌɔɛɪiʊuəɚɜAIOQWYᵊᵻaeoɐɒpbmfvwɹʃʒʧʤszʦtdnlTɾθðkɡŋjhxʔ")  # noqa: RUF001
"""Classes of phonemes; the first is silence. Punctuation is ``pause``, what is not listed is ``other``."""
_PHONE_INDEX = {symbol: i for i, symbol in enumerate(PHONES)}
_SLOTS = 2
"""Phonemes are given for each half of a frame: a /p/ lasts 50 ms."""


class State(IntEnum):
    """What the avatar is doing."""

    IDLE = 0
    LISTENING = 1
    SPEAKING = 2


NUM_MELS = 40
_MELS_PER_FRAME = 4
_MEL_HOP = FRAME_SAMPLES // _MELS_PER_FRAME
_MEL_WINDOW = 600
_FFT = 1024
_MEL_LOW_HZ, _MEL_HIGH_HZ = 60.0, 7600.0
_MEL_FLOOR = 1e-7


@functools.cache
def _analysis() -> tuple[Floats, Floats]:
    """Mel bands ``[bins, mels]``, each summing to one, and the analysis window of power one."""
    bank = mel_bank(NUM_MELS, _FFT, RATE_HZ, low_hz=_MEL_LOW_HZ, high_hz=_MEL_HIGH_HZ)
    bank /= bank.sum(axis=0, keepdims=True)
    window = np.hanning(_MEL_WINDOW + 2)[1:-1]
    window /= math.sqrt(float((window**2).sum()))
    return bank.astype(np.float32), window.astype(np.float32)


def mel_of(samples_S: Floats) -> Floats:
    """Log-mel ``[A, 160]`` of A whole frames of sound, four spectra of 40 bands to a frame, about -2..2.

    ``samples_S`` begins 360 samples before the first frame: a spectrum looks back 25 ms and never ahead. A
    frame's numbers do not depend on how many frames are computed together.
    """
    bank, window = _analysis()
    num_frames = (len(samples_S) - _MEL_CONTEXT) // FRAME_SAMPLES
    if num_frames <= 0:
        return np.zeros((0, _MELS_PER_FRAME * NUM_MELS), np.float32)
    count = num_frames * _MELS_PER_FRAME
    views = np.lib.stride_tricks.sliding_window_view(samples_S, _MEL_WINDOW)[::_MEL_HOP][:count]
    power = np.abs(np.fft.rfft(views * window, _FFT)).astype(np.float32) ** 2
    # One product per frame: a larger one may add in another order, and then streamed and whole would differ.
    bands = np.concatenate([power[i : i + _MELS_PER_FRAME] @ bank for i in range(0, count, _MELS_PER_FRAME)])
    log_mel = (np.log(bands + np.float32(_MEL_FLOOR)) + np.float32(8.0)) / np.float32(4.0)
    return log_mel.reshape(num_frames, -1)


_MEL_CONTEXT = _MEL_WINDOW - _MEL_HOP
SILENT_MEL = (math.log(_MEL_FLOOR) + 8.0) / 4.0
"""The value of every band in digital silence."""


def phone_class(symbol: str) -> int:
    """Index of a phoneme symbol in `PHONES`."""
    if symbol in PAUSES and symbol:
        return _PHONE_INDEX["pause"]
    return _PHONE_INDEX.get(symbol, _PHONE_INDEX["other"])


def phones_of(phonemes: Sequence[Phoneme], num_frames: int) -> Floats:
    """Share of each half frame that each phoneme class fills, ``[A, 2 * len(PHONES)]``; silence where none
    is named.

    Times are seconds from the start of frame 0.
    """
    slots = num_frames * _SLOTS
    rate = FPS * _SLOTS
    share = np.zeros((slots, len(PHONES)), np.float32)
    for symbol, start_s, end_s in phonemes:
        start, end = max(0.0, start_s * rate), min(float(slots), end_s * rate)
        if end <= start:
            continue
        first, last = int(start), min(slots - 1, math.ceil(end) - 1)
        at = np.arange(first, last + 1)
        overlap = np.minimum(at + 1, end) - np.maximum(at, start)
        share[first : last + 1, phone_class(symbol)] += overlap
    share[:, 0] += np.maximum(0.0, 1.0 - share.sum(axis=1))
    return share.reshape(num_frames, NUM_PHONE)


NUM_MEL = _MELS_PER_FRAME * NUM_MELS
NUM_PHONE = _SLOTS * len(PHONES)
NUM_CUES = NUM_MEL + NUM_PHONE + 2 + len(State) + NUM_INTENT


@dataclass(frozen=True, slots=True)
class Cues:
    """Input features of some frames; without intent, which a `MotionStream` adds itself."""

    mel_AF: Floats
    phones_AP: Floats
    heard_A: NDArray[np.bool_]
    """Whether ``mel_AF`` says anything."""
    said_A: NDArray[np.bool_]
    """Whether ``phones_AP`` says anything."""
    state_A: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.state_A)

    def __getitem__(self, at: slice) -> Cues:
        return Cues(*(getattr(self, f.name)[at] for f in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Cues]) -> Cues:
        return Cues(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Cues)))

    @staticmethod
    def silence(num_frames: int, state: State = State.IDLE) -> Cues:
        """Frames without sound, known to be silent."""
        phones_AP = phones_of((), num_frames)
        mel_AF = np.full((num_frames, NUM_MEL), SILENT_MEL, np.float32)
        yes_A = np.ones(num_frames, np.bool_)
        return Cues(mel_AF, phones_AP, yes_A, yes_A.copy(), np.full(num_frames, int(state), np.int8))

    @staticmethod
    def sound(
        samples_S: Floats,
        phonemes: Sequence[Phoneme] | None,
        *,
        before_S: Floats,
        state: State = State.SPEAKING,
    ) -> Cues:
        """Whole frames of sound; ``before_S``: at least 360 samples that precede them."""
        if len(samples_S) % FRAME_SAMPLES:
            raise InputError(f"cues need whole frames of {FRAME_SAMPLES} samples, got {len(samples_S)}; pad with zeros")
        num_frames = len(samples_S) // FRAME_SAMPLES
        mel_AF = mel_of(np.concatenate([before_S[-_MEL_CONTEXT:], samples_S]))
        said = phonemes is not None
        phones_AP = phones_of(phonemes or (), num_frames)
        return Cues(
            mel_AF,
            phones_AP,
            np.ones(num_frames, np.bool_),
            np.full(num_frames, said, np.bool_),
            np.full(num_frames, int(state), np.int8),
        )

    def rows(self, intent_AI: Floats) -> Floats:
        """The numbers that the model reads, ``[A, NUM_CUES]``; what is unknown is zero."""
        heard = self.heard_A[:, None].astype(np.float32)
        said = self.said_A[:, None].astype(np.float32)
        state = np.eye(len(State), dtype=np.float32)[self.state_A]
        return np.concatenate([self.mel_AF * heard, self.phones_AP * said, heard, said, state, intent_AI], axis=1)
