"""The faces of a conversation: one speaks a part of a reply, the others listen; and where it was interrupted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from typing import Protocol

import numpy as np

from streamdiff.conversation.mouth import Mouth, ProportionalMouth
from streamdiff.conversation.reply import Part, Reply
from streamdiff.errors import BackendError, ConfigError
from streamdiff.stream import Can, Interrupted, Segment, Shown

logger = logging.getLogger(__name__)

_NAP_S = 0.02
_AUDIBLE = 1e-3


class Talker(Protocol):
    """What a conversation needs of a `session.Session`."""

    @property
    def rate_hz(self) -> int:
        """Samples per second of its sound."""
        ...

    @property
    def can(self) -> frozenset[Can]:
        """What it can do."""
        ...

    def say(self, text: str | Iterable[str] | AsyncIterable[str]) -> Segment:
        """Speak; returns at once."""
        ...

    def listen(self, listening: bool = True) -> None:
        """Show that somebody speaks to it."""
        ...

    def interrupt(self, played_s: float | None = None) -> Interrupted:
        """Stop speaking."""
        ...

    def __aiter__(self) -> AsyncIterator[Shown]:
        """Its frames."""
        ...


class Faces:
    """One face or several, by name.

    Args:
        faces: by the name of the speaker; the only one may be called "".
        mouths: by the same names, or one for the only face; None: by proportion.
        on_sound: called when the first sound of a part is shown.
    """

    def __init__(
        self,
        faces: Talker | Mapping[str, Talker],
        mouths: Mouth | Mapping[str, Mouth] | None,
        on_sound: Callable[[Part], None],
    ) -> None:
        self._faces: dict[str, Talker] = dict(faces) if isinstance(faces, Mapping) else {"": faces}
        if not self._faces or (len(self._faces) > 1 and "" in self._faces):
            raise ConfigError(f"several faces need a name each, got {list(self._faces)}")
        named: Mapping[str, Mouth] = mouths if isinstance(mouths, Mapping) else {}
        if mouths is not None and not isinstance(mouths, Mapping):
            named = dict.fromkeys(self._faces, mouths)
        self._mouths = {name: named.get(name) or ProportionalMouth() for name in self._faces}
        self._on_sound = on_sound
        self._part: Part | None = None

    @property
    def first(self) -> str:
        """Who speaks when nobody is named."""
        return next(iter(self._faces))

    @property
    def names(self) -> tuple[str, ...]:
        """All speakers; none where there is only one."""
        return tuple(self._faces) if len(self._faces) > 1 else ()

    def face(self, speaker: str) -> Talker:
        """A face by name; "" is the first."""
        if speaker and speaker not in self._faces:
            raise ConfigError(f"no face is called {speaker!r}; there are {', '.join(self._faces)}")
        return self._faces[speaker or self.first]

    def attend(self, listening: bool, *, but: str | None = None) -> None:
        """All faces, but one, listen or no longer do."""
        for name, face in self._faces.items():
            if name != but and Can.LISTEN in face.can:
                face.listen(listening)

    async def speak(self, reply: Reply) -> None:
        """Speak what was not heard of a reply, as it is written, until all of it was heard."""
        try:
            while (part := await reply.part()) is not None:
                if await part.has_more():
                    await self._say(part)
                part.heard = len(part.text)
                reply.at += 1
        finally:
            self._part = None

    async def _say(self, part: Part) -> None:
        part.begun, part.started_s = part.heard, None
        if self.names:
            self.attend(True, but=part.speaker)
        face = self._faces[part.speaker]
        self._part, part.segment = part, face.say(part.rest())
        while not part.segment.done:
            await asyncio.sleep(_NAP_S)
            if part.started_s is None and part.segment.num_shown:
                self._started(part)
        if self.names:
            self.attend(False, but=part.speaker)
        if part.segment.error is not None:
            raise BackendError(f"the voice failed: {part.segment.error}") from part.segment.error
        if part.started_s is not None:
            took_s = asyncio.get_running_loop().time() - part.started_s
            self._mouths[part.speaker].spoken(part.text[part.begun :], took_s)

    def _started(self, part: Part) -> None:
        part.started_s = asyncio.get_running_loop().time()
        self._on_sound(part)

    def note(self, shown: Shown, speaker: str) -> None:
        """These frames of a face are being shown."""
        part = self._part
        if part is None or part.started_s is not None or part.segment is None or part.speaker != speaker:
            return
        if part.segment.id == shown.segment and float(np.abs(shown.sound_S).max(initial=0.0)) > _AUDIBLE:
            self._started(part)

    def stop(self, reply: Reply) -> tuple[str, Interrupted] | None:
        """Fall silent, and note in the reply what was heard; who spoke, and what the session says about it."""
        part = reply.parts[reply.at] if reply.at < len(reply.parts) else None
        if part is None or part.segment is None:
            return None
        report = self._faces[part.speaker].interrupt()
        if report.segment == part.segment.id:
            rest = part.text[part.begun :]
            part.heard = part.begun + self._mouths[part.speaker].heard(report.segment, rest, report.played_s)
        elif part.segment.done and not part.segment.interrupted:
            part.heard = len(part.text)
        self._part = None
        if self.names:
            self.attend(False, but=part.speaker)
        return part.speaker, report
