"""Drawn talking heads: clip ``i`` is made from ``(seed, i)`` alone, in any order and on any machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from streamdiff import rng
from streamdiff.avatar.head3d import HeadModel
from streamdiff.errors import ConfigError
from streamdiff.training.data.clip import FRAME_SAMPLES, NUM_FRAMES, PROMPTS, TRUTH, Clip
from streamdiff.training.data.score import compose
from streamdiff.training.data.speech import Voices
from streamdiff.training.faces import Build, Look, Painter


class DrawnClips:
    """Drawn talking heads. ``looks`` consecutive clips share one motion and one skull, in other looks.

    Args:
        head: ICT-FaceKit's light model.
        voices: where sound comes from; anything with `Voices.sound`.
        count: how many clips there are.
        size: height and width in pixels.
        first: number of the first clip; training and judging use numbers far apart.
    """

    def __init__(
        self,
        head: HeadModel,
        voices: Voices,
        *,
        count: int,
        size: int = 128,
        looks: int = 4,
        seed: int = 0,
        first: int = 0,
        num_frames: int = NUM_FRAMES,
    ) -> None:
        if count < 1 or looks < 1 or size < 16:
            raise ConfigError(f"clips need count, looks >= 1 and size >= 16, got {count}, {looks}, {size}")
        self.size, self.seed, self.first, self.looks, self.num_frames = size, seed, first, looks, num_frames
        self._head, self._voices, self._count = head, voices, count

    def __len__(self) -> int:
        return self._count

    def clip(self, index: int) -> Clip:
        return next(self._family(index // self.looks, [index % self.looks]))

    def clips(self, start: int, stop: int) -> Iterator[Clip]:
        """Clips ``start .. stop - 1``; a body is drawn once for all its looks."""
        at = start
        while at < stop:
            until = min(stop, (at // self.looks + 1) * self.looks)
            yield from self._family(at // self.looks, [i % self.looks for i in range(at, until)])
            at = until

    def _family(self, family: int, members: Sequence[int]) -> Iterator[Clip]:
        number = self.first + family
        generator = np.random.default_rng(rng.seed_of("drawn clip", self.seed, number))
        build = Build.draw(generator, len(self._head.identity_KV3))
        sound_S = self._voices.sound(self.num_frames * FRAME_SAMPLES, generator)
        score = compose(self._head, sound_S, generator)
        texts = PROMPTS[score.action]
        painter = Painter(self._head, build, size=self.size)
        bodies = [painter.body(pose) for pose in score.poses]
        photo = painter.body(score.photo)
        for member in members:
            drawn = np.random.default_rng(rng.seed_of("look", self.seed, number, member))
            look = Look.draw(drawn)
            truth_TE = score.truth_TE.copy()
            truth_TE[:, TRUTH.index("badge")] = float(look.has_badge)
            yield Clip(
                frames_THWC=np.stack([painter.dress(body, look) for body in bodies]),
                photo_HWC=painter.dress(photo, look),
                sound_S=sound_S,
                prompt=texts[int(drawn.integers(len(texts)))],
                truth_TE=truth_TE,
            )
