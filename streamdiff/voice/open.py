"""A voice by the name that a command line gives."""

from __future__ import annotations

import math

from streamdiff.errors import ConfigError
from streamdiff.voice.hibari import HibariVoice
from streamdiff.voice.kokoro import KokoroVoice
from streamdiff.voice.speech import Synthesizer


def open_voice(name: str = "heart") -> Synthesizer:
    """Open a voice by the name that a command line gives.

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
