"""The models that are judged: weights, and how they are run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from streamdiff import flow, presets
from streamdiff.engine import Engine, Weights
from streamdiff.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Model:
    """Weights, and how they are run."""

    name: str
    folder: Path | None = None
    """None: those that come with the preset."""
    sigmas: tuple[float, ...] | None = None
    renoise: bool | None = None

    @classmethod
    def parse(cls, text: str) -> Model:
        """``NAME=FOLDER[,steps=N][,sigmas=1/0.75][,euler|renoise]``; an empty folder: the shipped weights.

        >>> Model.parse("teacher=,steps=2,euler").sigmas
        (1.0, 0.75, 0.0)
        """
        name, _, rest = text.partition("=")
        folder, *options = rest.split(",")
        sigmas, renoise = None, None
        for option in options:
            key, _, value = option.partition("=")
            if key == "steps" and value.isdigit() and int(value) > 0:
                sigmas = flow.shifted_grid(int(value))
            elif key == "sigmas":
                sigmas = (*map(float, value.split("/")), 0.0)
            elif option in ("euler", "renoise"):
                renoise = option == "renoise"
            else:
                raise ConfigError(f"--model takes steps=N, sigmas=A/B, euler or renoise, got {option!r}")
        if not name:
            raise ConfigError(f"--model begins with a name, got {text!r}; write NAME=FOLDER")
        return cls(name, Path(folder) if folder else None, sigmas, renoise)

    def engine(self, *, adaptive_sink: bool | None = None) -> Engine:
        """What makes the parts of a stream, as served."""
        config = presets.portrait()
        if self.sigmas is not None:
            config = dataclasses.replace(config, sigmas=self.sigmas)
        if self.renoise is not None:
            config = dataclasses.replace(config, renoise=self.renoise)
        if adaptive_sink is not None:
            config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, adaptive_sink=adaptive_sink))
        return Engine(config, weights=Weights(folder=self.folder))
