"""Bearer tokens: JSON Web Tokens (RFC 7519), signed with a key that the server and whoever lets people in share.

Claims: ``aud`` is ``streamdiff``, ``exp`` and ``sub`` (the user) are required; ``avatars``, a list of names, limits
what may be shown; ``priority``, a whole number, lets those above 0 take reserved seats and wait in front.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jwt

from streamdiff.errors import ConfigError
from streamdiff.serve.gate import Denied, Guest

AUDIENCE = "streamdiff"
MIN_KEY_BYTES = 32
_ALGORITHM = "HS256"
_MAX_TOKEN = 4_096
_LEEWAY_S = 5.0


class TokenGate:
    """Lets in whoever has a token signed with this key.

    Args:
        key: secret, at least 32 bytes.

    Raises:
        ConfigError: a key that can be guessed.
    """

    def __init__(self, key: bytes) -> None:
        _check_key(key)
        self._key = key

    def admit(self, token: str | None) -> Guest:
        """Of `Gate`. The signature is compared in constant time; what is wrong with a token is told to nobody."""
        try:
            claims: dict[str, Any] = jwt.decode(
                (token or "")[:_MAX_TOKEN],
                self._key,
                algorithms=[_ALGORITHM],
                audience=AUDIENCE,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "aud", "sub"]},
            )
        except jwt.PyJWTError:
            raise Denied("no valid token") from None
        user, avatars, priority = claims["sub"], claims.get("avatars"), claims.get("priority", 0)
        if not isinstance(user, str) or not user or type(priority) is not int:
            raise Denied("no valid token")
        if avatars is not None and not (isinstance(avatars, list) and all(isinstance(name, str) for name in avatars)):
            raise Denied("no valid token")
        return Guest(user, priority=priority, avatars=None if avatars is None else frozenset(avatars))


def mint(
    key: bytes, user: str, *, lasts_s: float = 3_600.0, avatars: Sequence[str] | None = None, priority: int = 0
) -> str:
    """A token for this user. Errors as `TokenGate`."""
    _check_key(key)
    claims: dict[str, Any] = {"aud": AUDIENCE, "sub": user, "exp": int(time.time() + lasts_s), "priority": priority}
    if avatars is not None:
        claims["avatars"] = list(avatars)
    return jwt.encode(claims, key, algorithm=_ALGORITHM)


def _check_key(key: bytes) -> None:
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"a token key needs {MIN_KEY_BYTES} bytes or more, got {len(key)}; "
            "make one with: openssl rand -base64 48 > token.key"
        )
