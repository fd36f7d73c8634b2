"""Tokens: signed, for us, not expired, with a user; everything else is denied in one and the same way."""

from __future__ import annotations

import time
from typing import Any

import jwt
import pytest

from streamdiff.errors import ConfigError
from streamdiff.serve.gate import Denied, Guest
from streamdiff.serve.tokens import TokenGate, mint

KEY = b"k" * 32


def signed(key: bytes = KEY, algorithm: str = "HS256", **changes: Any) -> str:
    claims = {"aud": "streamdiff", "sub": "ann", "exp": int(time.time()) + 60} | changes
    return jwt.encode({k: v for k, v in claims.items() if v is not None}, key, algorithm=algorithm)


def test_a_minted_token_lets_its_user_in() -> None:
    gate = TokenGate(KEY)
    assert gate.admit(mint(KEY, "ann")) == Guest("ann")
    assert gate.admit(mint(KEY, "bob", avatars=["demo"], priority=2)) == Guest("bob", 2, frozenset({"demo"}))


@pytest.mark.parametrize(
    "token",
    [
        None,
        "",
        "x.y.z",
        "a" * 100_000,
        signed(b"q" * 32),
        signed(exp=int(time.time()) - 60),
        signed(exp=None),
        signed(aud="elsewhere"),
        signed(aud=None),
        signed(sub=None),
        signed(sub=""),
        signed(avatars="demo"),
        signed(avatars=[1]),
        signed(priority="1"),
        signed(key=b"k" * 64, algorithm="HS512"),
        jwt.encode({"aud": "streamdiff", "sub": "ann", "exp": int(time.time()) + 60}, None, algorithm="none"),  # type: ignore[arg-type]
    ],
    # Tokens differ from process to process, and every worker must find the same tests.
    ids=[
        *("none", "empty", "nonsense", "long", "another key", "expired", "no expiry", "other audience", "no audience"),
        *("no subject", "empty subject", "avatars no list", "avatars no names", "priority no number"),
        *("other algorithm", "unsigned"),
    ],
)
def test_any_other_token_is_denied_without_a_reason(token: str | None) -> None:
    with pytest.raises(Denied, match=r"^no valid token$"):
        TokenGate(KEY).admit(token)


def test_a_key_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 bytes or more, got 31"):
        TokenGate(KEY[:31])
