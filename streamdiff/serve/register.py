"""Who saw whom, and when: the sessions of a server in an audit log, without a word of what was said."""

from __future__ import annotations

from collections.abc import Mapping

from streamdiff.serve.leases import Refused
from streamdiff.serve.protocol import Ending
from streamdiff.trust.audit import AuditError, AuditLog


class Unrecorded(Refused):
    """The audit log cannot be written, and no session is opened unrecorded."""

    code = "unrecorded"


class Register:
    """Writes sessions into an audit log. Every call waits for the disk: call it in a thread.

    Args:
        log: where to.
        avatars: hash of the content of each avatar, by name; the first is shown unless another is asked for.
    """

    def __init__(self, log: AuditLog, avatars: Mapping[str, str]) -> None:
        self._log, self._avatars = log, dict(avatars)

    def opened(self, session: str, user: str, avatar: str) -> None:
        """A session is about to be opened.

        Raises:
            Unrecorded: it cannot be recorded, and must not be opened.
        """
        name = avatar or next(iter(self._avatars), "")
        try:
            self._log.write("opened", session=session, user=user, avatar=name, bundle=self._avatars.get(name, ""))
        except AuditError as error:
            why = "this server cannot write its audit log and opens no sessions; ask its operator"
            raise Unrecorded(why, retry_after_s=30) from error

    def ended(self, session: str, reason: Ending, lasted_s: float) -> None:
        """A session has ended. AuditError: this cannot be recorded."""
        self._log.write("ended", session=session, reason=reason.value, lasted_s=round(lasted_s, 1))
