"""Whom a server may show, and to whom, now: consents inside the avatars' bundles, and a list of what was withdrawn.

Asked when a session is leased, and again and again while it runs: a consent that expires or is withdrawn ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from streamdiff.errors import InputError
from streamdiff.trust.consent import ConsentError, Withdrawn, check_consent, read_withdrawn
from streamdiff.trust.keys import PublicKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Signed:
    """What a bundle says of itself."""

    sha256: str
    statements: tuple[str, ...] = ()


class Permits:
    """May this avatar be shown to this user?

    Args:
        avatars: the server's own, by name; the first is shown unless another is asked for.
        trusted: keys whose consents count; None: no consent is asked for.
        scopes: what a consent must be for (`trust.consent.SCOPES`); films beside conversations where sessions are kept.
        withdrawn: a list that is read again and again (`trust.consent`); None: nothing can be withdrawn. Replace it by
            renaming a new one into its place: of a list that is half written, half is obeyed.
        clock: what time it is.
    """

    def __init__(
        self,
        avatars: Mapping[str, Signed],
        *,
        trusted: Sequence[PublicKey] | None = None,
        scopes: Sequence[str] = ("live",),
        withdrawn: Path | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._clock, self._scopes = clock, tuple(scopes)
        self._avatars, self._trusted, self._path = dict(avatars), trusted, withdrawn
        self._withdrawn = Withdrawn()
        self._unread = ""

    def check(self, avatar: str, user: str) -> None:
        """Read the list, then decide. Blocks for as long as reading a small file does.

        Raises:
            ConsentError: not to be shown to this user; or the list cannot be read, and nobody is let in unseen.
        """
        self.reread()
        if self._unread:
            raise ConsentError("nobody can be shown: what was withdrawn cannot be read")
        if why := self.why_not(avatar, user):
            raise ConsentError(why)

    def doubts(self, shown: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Read the list; then which of these, avatar and user, may not go on, and why. For a thread: it verifies."""
        self.reread()
        return {each: why for each in shown if (why := self.why_not(*each))}

    def reread(self) -> None:
        """Read the list of withdrawals. One that cannot be read leaves the last one standing."""
        if self._path is None:
            return
        try:
            self._withdrawn = read_withdrawn(self._path)
        except InputError as error:
            if not self._unread:
                logger.error("nobody is let in until the list of withdrawals can be read again: %s", error)
            self._unread = str(error)
        else:
            self._unread = ""

    def why_not(self, avatar: str, user: str) -> str:
        """Why this avatar may not be shown to this user, by the list as it was last read; empty: it may."""
        if user in self._withdrawn.users:
            return "this user may not come in any more"
        name = avatar or next(iter(self._avatars), "")
        signed = self._avatars.get(name)
        if signed is not None and signed.sha256 in self._withdrawn.bundles:
            return f"{name[:40]} may not be shown any more"
        if self._trusted is None:
            return ""
        if signed is None:
            return "this server shows nobody without a signed record of consent"
        try:
            for scope in self._scopes:
                check_consent(
                    signed.statements,
                    signed.sha256,
                    trusted=self._trusted,
                    scope=scope,
                    withdrawn=self._withdrawn,
                    now=self._clock(),
                )
        except InputError as error:
            return f"{name[:40]} may not be shown: {error}"
        return ""
