"""What several streams of one avatar share: weights that are loaded once, and a door to open streams by."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from streamdiff.avatar.bundle import IdentityBundle
from streamdiff.avatar.cues import Cues
from streamdiff.avatar.identity import open_bundle
from streamdiff.avatar.kinematics import FPS
from streamdiff.avatar.motion import MotionStream
from streamdiff.avatar.stream import AvatarStream, Renderer
from streamdiff.avatar.window import MotionModel, load_motion
from streamdiff.session import Opening
from streamdiff.voice import RATE_HZ, Synthesizer, open_voice


class AvatarEngine:
    """A voice, a motion model, and a renderer of one person; opens any number of streams of that person.

    Args:
        renderer: draws this person; see `streamdiff.avatar.render`.
        voice: see `open_voice`; None: sound from outside only.
        motion: see `load_motion`; None: the packaged model.
        style: how this person moves, by name.
        name: of this person.
        bundle: what the renderer draws, for those who ask who signed it.

        engine = AvatarEngine.load("face.jpg")
        async with engine.open() as session:
            session.say("Hello there!")
            async for shown in session:
                play(shown.frames_THWC, shown.sound_S)
    """

    fps = FPS
    rate_hz = RATE_HZ

    def __init__(
        self,
        renderer: Renderer,
        *,
        voice: Synthesizer | None = None,
        motion: MotionModel | None = None,
        style: Mapping[str, float] | None = None,
        name: str = "",
        bundle: IdentityBundle | None = None,
    ) -> None:
        self.name, self.bundle = name, bundle
        self._renderer, self._voice, self._style = renderer, voice, dict(style or {})
        self._motion = motion or load_motion()
        self._numbers = itertools.count()
        self._warm_up()

    @classmethod
    def load(
        cls,
        person: str | Path | None = None,
        *,
        size: int = 256,
        voice: str | Synthesizer | None = "heart",
        motion: str | Path | None = None,
        style: Mapping[str, float] | None = None,
        keep: bool = False,
    ) -> AvatarEngine:
        """The engine of a photo or a bundle: slow, once; opening sessions afterwards is cheap.

        Args:
            person: a photo, or a bundle of ``streamdiff avatar``; None: the photo of the demo.
            size: pixels along a side, for a photo: 256 or 512.
            voice: a voice, or its name (see `open_voice`); None: sound from outside only.
            motion: weights of the motion model; None: those of the package.
            style: how this person moves, beyond what the bundle says.
            keep: whether what is made of a photo is kept in the user's cache folder for the next time.

        Raises InputError for what is no photo of a face or no bundle.
        """
        from streamdiff.avatar.render import WarpRenderer  # a caller with a renderer of its own needs none of this

        bundle = open_bundle(person, size=size, keep=keep)
        return cls(
            WarpRenderer(bundle),
            voice=open_voice(voice) if isinstance(voice, str) else voice,
            motion=load_motion(motion),
            style={**bundle.style, **(style or {})},
            name=bundle.name,
            bundle=bundle,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self._renderer.size, self._renderer.size

    def stream(self, *, seed: int = 0, stream: int | None = None, realtime: bool = False) -> AvatarStream:
        """A synchronous stream; see `AvatarStream`.

        ``stream``: number that keys its randomness beside the seed; None: one that this engine has not given yet, so
        that two streams do not move alike. Same seed, number and calls: same frames.
        """
        return AvatarStream(
            self._renderer,
            voice=self._voice,
            motion=self._motion,
            style=self._style,
            seed=seed,
            stream=next(self._numbers) if stream is None else stream,
            realtime=realtime,
        )

    def open(self, *, seed: int = 0, stream: int | None = None, realtime: bool = True) -> Opening:
        """A session: ``async with engine.open() as session``; see `stream` and `streamdiff.session.Session`."""
        return Opening(lambda: self.stream(seed=seed, stream=stream, realtime=realtime))

    def _warm_up(self) -> None:
        """First calls allocate and choose kernels: let nobody wait for that."""
        motion = MotionStream(self._motion)
        for length in self._motion.config.lengths:
            motion.revise(Cues.silence(length))
            frame_E = motion.emit()
            self._renderer.render(frame_E[None])
