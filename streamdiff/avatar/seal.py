"""Closed lips for p, b and m: a detector that hears them, and what a face does then.

The motion model follows loudness and vowels; from sound alone it leaves the lips open for every other bilabial, which
is what a viewer sees first. Where phonemes are known they are taken from there. Elsewhere a small convolutional network
listens to six frames before a frame and two after it, the 80 ms by which live motion looks ahead anyway.

Axes: A frames, T spectra (four to a frame), F mel bands, P phoneme classes of a frame, E coefficients.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamdiff.arrays import Floats
from streamdiff.avatar.cues import NUM_MELS, PHONES, SILENT_MEL, Cues
from streamdiff.avatar.kinematics import KinematicSpec
from streamdiff.packaged import packaged
from streamdiff.tensorfile import TensorFile, like

BILABIALS = "pbm"
PAST, AHEAD = 6, 2
"""Frames that the detector hears before and after the one that it judges."""
_SPECTRA = 4
_JUDGED = 20
"""Spectra, the last of those heard, from which the answer is made."""
_IS_BILABIAL_P = np.array([bool(p) and p in BILABIALS for p in PHONES])


class SealDetector(nn.Module):
    """Log-mel ``[A, T, F]`` of nine frames to the log odds ``[A]`` that lips are closed in the seventh."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.enter = nn.Linear(NUM_MELS, width)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation) for dilation in (1, 1, 2)
        )
        self.leave = nn.Sequential(nn.Linear(width * _JUDGED, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, mel_ATF: Tensor) -> Tensor:
        # How loud the sound is says nothing: a mean of log-mel is a gain.
        level_A11 = mel_ATF.mean((1, 2), keepdim=True)
        h_AFT = F.gelu(self.enter(mel_ATF - level_A11)).transpose(1, 2)
        for layer in self.layers:
            h_AFT = h_AFT + F.gelu(layer(h_AFT))
        return self.leave(h_AFT[:, :, -_JUDGED:].flatten(1))[:, 0]


def spectra(mel_AF: Floats) -> Tensor:
    """What the detector hears for each of A frames, ``[A, T, F]``, from the mel of ``PAST + A + AHEAD``."""
    frames = torch.from_numpy(np.ascontiguousarray(mel_AF, np.float32))
    return frames.unfold(0, PAST + 1 + AHEAD, 1).transpose(1, 2).reshape(-1, (PAST + 1 + AHEAD) * _SPECTRA, NUM_MELS)


@functools.cache
def load_seals() -> SealDetector:
    """The detector that ships with the package. Raises CheckpointError when it was altered."""
    return read_seals(packaged("seal_detector.safetensors"))


def read_seals(path: Path) -> SealDetector:
    """A detector from a file. Raises CheckpointError for a file of something else."""
    hint = "train it: streamdiff train seals --help"
    file = TensorFile(path, what="a detector of closed lips", hint=hint, most_bytes=_MAX_BYTES)
    with torch.device("meta"):
        model = SealDetector()
    wanted = like(model.state_dict())
    tensors = file.tensors(wanted)
    file.check_values(tensors, wanted)
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return model.eval().requires_grad_(requires_grad=False)


_MAX_BYTES = 16 << 20
_SURE = 2.0
"""Log odds between lips that are left alone and lips that are closed."""


@torch.inference_mode()
def heard_seal(detector: SealDetector, cues: Cues) -> float:
    """How surely the lips are closed in the seventh of at most nine frames, 0..1; later ones are taken for silence."""
    mel_AF = cues.mel_AF
    missing = PAST + 1 + AHEAD - len(mel_AF)
    if missing:
        mel_AF = np.concatenate([mel_AF, np.full((missing, mel_AF.shape[1]), SILENT_MEL, np.float32)])
    odds = float(detector(spectra(mel_AF)))
    # Closed from even odds on: half-closed lips look like neither.
    return min(max(odds / _SURE + 0.5, 0.0), 1.0)


def said_seal(phones_P: Floats) -> float:
    """How far a bilabial closes the lips in a frame, 0..1, by its share of either half.

    >>> from streamdiff.avatar.cues import phones_of
    >>> from streamdiff.voice import Phoneme
    >>> [round(said_seal(row), 2) for row in phones_of([Phoneme("m", 0.045, 0.095)], 3)]
    [0.0, 1.0, 1.0]
    """
    share_2 = phones_P.reshape(2, -1)[:, _IS_BILABIAL_P].sum(axis=1)
    return float(np.clip((share_2.max() - 0.25) / 0.5, 0.0, 1.0))


class Lips:
    """Closes the lips of frames of one layout of coefficients."""

    def __init__(self, spec: KinematicSpec) -> None:
        found = set(spec.names)
        self._can = {"jawOpen", "mouthClose"} <= found
        self._index = {
            name: spec.index(name) for name in (*_PARTED, *_PRESSED, "jawOpen", "mouthClose") if name in found
        }

    def close(self, frame_E: Tensor, share: float) -> Tensor:
        """The frame with lips that are closed by ``share``, 0..1; what else the face does stays."""
        if not self._can or share <= 0.0:
            return frame_E
        at = self._index
        sealed_E = frame_E.clone()
        # The jaw hardly rises for a closure between vowels: it is the lips that meet, however low it hangs.
        sealed_E[at["mouthClose"]] = torch.maximum(frame_E[at["mouthClose"]], frame_E[at["jawOpen"]])
        for name in _PARTED:
            if name in at:
                sealed_E[at[name]] *= 0.1
        for name, least in _PRESSED.items():
            if name in at:
                sealed_E[at[name]] = sealed_E[at[name]].clamp(min=least)
        return torch.lerp(frame_E, sealed_E, share)


_PARTED = ("mouthLowerDownLeft", "mouthLowerDownRight", "mouthUpperUpLeft", "mouthUpperUpRight")
_PRESSED = {"mouthPressLeft": 0.3, "mouthPressRight": 0.3, "mouthRollLower": 0.2, "mouthRollUpper": 0.13}
