"""A reply while it is being written and spoken: who says what, and how much of it was heard.

With several speakers the mind writes their names in brackets before what they say: ``[anna] Good evening.
[ben] Hello!``
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field

from streamdiff.stream import Segment


class Part:
    """What one speaker says in a reply, or the next of several things; grows until it is closed."""

    def __init__(self, speaker: str, text: str = "") -> None:
        self.speaker = speaker
        self.text = text
        self.heard = 0
        """Letters that were heard."""
        self.is_closed = False
        self.segment: Segment | None = None
        """Its utterance, or what is left of it, in the session."""
        self.begun = 0
        """Letters before that utterance."""
        self.started_s: float | None = None
        """When the first sound of that utterance was shown, by the loop's clock."""
        self._grown = asyncio.Event()

    @property
    def has_words(self) -> bool:
        """Whether anything that can be spoken is left that was not heard."""
        return any(c.isalnum() for c in self.text[self.heard :])

    def add(self, text: str) -> None:
        """More of it was written."""
        self.text += text
        self._wake()

    def close(self) -> None:
        """Nothing more will be written."""
        self.is_closed = True
        self._wake()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    async def has_more(self) -> bool:
        """Wait until there is a word to be spoken, or there will never be."""
        while not self.has_words and not self.is_closed:
            await self._grown.wait()
        return self.has_words

    async def rest(self) -> AsyncIterator[str]:
        """What was not heard of it, as it is written."""
        at = self.heard
        while True:
            grown = self._grown
            if at < len(self.text):
                piece, at = self.text[at:], len(self.text)
                yield piece
            elif self.is_closed:
                return
            else:
                await grown.wait()


@dataclass(slots=True)
class Reply:
    """All that is said in one turn of the mind, in parts that follow each other."""

    speaker: str
    """Who speaks before anybody is named."""
    speakers: Collection[str] = ()
    is_excuse: bool = False
    """Whether it was not the mind that wrote it."""
    parts: list[Part] = field(default_factory=list)
    at: int = 0
    """The part that is being spoken."""
    is_written: bool = False
    failure: str = ""
    """Why it ended early, if it did."""
    _held: str = ""
    _grown: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, text: str) -> list[tuple[str, str]]:
        """More was written; returns it as pairs of speaker and text, without tags."""
        self._held += text
        added: list[tuple[str, str]] = []
        for speaker, piece in self._cut():
            if speaker is not None and (not self.parts or self.parts[-1].speaker != speaker):
                self._begin(speaker)
            if piece:
                part = self.parts[-1] if self.parts else self._begin(self.speaker)
                # A colon after a name may come in the next piece.
                piece = piece.lstrip(" \n:") if self.speakers and not part.text else piece
                part.add(piece)
                added += [(part.speaker, piece)] if piece else []
        return added

    def _cut(self) -> Iterator[tuple[str | None, str]]:
        """Pairs of a speaker that was named, or None, and text; what may become a tag is held back."""
        if not self.speakers:
            yield None, self._held
            self._held = ""
            return
        names = "|".join(re.escape(name) for name in self.speakers)
        *pieces, rest = re.split(rf"\s*\[({names})\]:?\s*", self._held, flags=re.IGNORECASE)
        speaker: str | None = None
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                yield speaker, piece
            else:
                speaker = next(name for name in self.speakers if name.lower() == piece.lower())
        open_tag = rest.rfind("[")
        longest = max(map(len, self.speakers)) + 2
        whole = (
            open_tag if open_tag >= 0 and len(rest) - open_tag < longest and "]" not in rest[open_tag:] else len(rest)
        )
        self._held = rest[whole:]
        yield speaker, rest[:whole]

    def _begin(self, speaker: str) -> Part:
        if self.parts:
            self.parts[-1].close()
        self.parts.append(Part(speaker))
        self._wake()
        return self.parts[-1]

    def finish(self) -> None:
        """Nothing more will be written."""
        if self._held:
            held, self._held = self._held, ""
            (self.parts[-1] if self.parts else self._begin(self.speaker)).add(held)
        self.is_written = True
        for part in self.parts:
            part.close()
        self._wake()

    def excuse(self, text: str) -> None:
        """The first speaker says this last."""
        self._begin(self.speaker).add(text)

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    async def part(self) -> Part | None:
        """The part that is to be spoken now; None when all have been."""
        while self.at >= len(self.parts):
            if self.is_written:
                return None
            await self._grown.wait()
        return self.parts[self.at]

    @property
    def text(self) -> str:
        """All of it, with the names of its speakers where there are several."""
        return self._joined(lambda part: part.text)

    @property
    def heard(self) -> str:
        """What was heard of it."""
        return self._joined(lambda part: part.text[: part.heard])

    @property
    def left(self) -> str:
        """What was written and not heard."""
        return self._joined(lambda part: part.text[part.heard :])

    def _joined(self, text_of: Callable[[Part], str]) -> str:
        said = [(part.speaker, text_of(part).strip()) for part in self.parts]
        return " ".join(f"[{speaker}] {text}" if self.speakers else text for speaker, text in said if text)
