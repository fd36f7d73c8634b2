"""Where ranks meet, and who may speak there.

Ranks on one machine meet on its loopback interface, which nobody else can reach. Under torchrun, whose store listens on
every interface, rank 0 listens at an address of its own and tells the others by a file that only their user can read.

Ranks on several machines meet in the launcher's store, to which anybody can write who reaches it. So what they say is
signed (HMAC-SHA256, RFC 2104) with a secret that they share; what is not is as if it had not been said.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from streamdiff.errors import ConfigError, RankFailed
from streamdiff.facts import Facts, parse_json, printable
from streamdiff.output import replacing

logger = logging.getLogger(__name__)

NOTHING = "-"
"""What a key holds before anybody has said anything."""
LEAST_SECRET = 16
"""Bytes of a secret."""
_MOST_BYTES = 1 << 16
"""Of a word in the store; longer ones are nobody's."""
_POLL_S = 0.05
_ATTEMPTS = 8


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("10.0.0.1"), is_loopback("node7")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at this address alone. Raises ConfigError when it is taken."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(1024)
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); choose another port") from error
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where ranks of one machine meet, and the secret that they share."""

    port: int
    secret: bytes

    def tell(self, path: Path) -> None:
        """Write it down for the other ranks of this user."""
        with replacing(path) as part:
            part.write_text(json.dumps({"port": self.port, "secret": self.secret.hex()}), encoding="ascii")

    @classmethod
    def on_this_machine(cls, port: int) -> Place:
        """A new one, with a secret that nobody has seen."""
        return cls(port, secrets.token_bytes(32))

    @classmethod
    def told_in(cls, path: Path, timeout_s: float) -> Place:
        """Wait for rank 0 to write it down. Raises RankFailed when it does not."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()[:1024]
                try:
                    facts = Facts(parse_json(data), _refuse)
                    return cls(facts.whole("port", 1, 65535), bytes.fromhex(facts.words("secret")))
                except ValueError as error:
                    raise RankFailed(f"{path} is not what rank 0 writes ({error}); remove it and start again") from None
            time.sleep(_POLL_S)
        raise RankFailed(f"rank 0 did not join within {timeout_s:.0f} s; look at its output", rank=0)


def _refuse(why: str) -> NoReturn:
    raise ValueError(why)


def private_folder() -> Path:
    """A folder that only this user can read and write; made where it is not there.

    Raises ConfigError when somebody else has put one in the way.
    """
    folder = Path(tempfile.gettempdir()) / f"streamdiff-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{folder} is not a folder of this user alone; remove it, or set TMPDIR to another place")
    return folder


def line_folder(name: str) -> Path:
    """Where the ranks of a line wait for their driver: in `private_folder`, by a name. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", name, flags=re.ASCII):
        raise ConfigError(f"a line is named by 1 to 32 letters, digits, - or _, got {name!r}")
    folder = private_folder() / f"line-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Meeting:
    """Words in a store, by key. With a secret they are signed, and what others write there does not count.

    ``store`` has `set`, `multi_get` and `compare_set` of torch's; ``purpose`` goes into every signature, so that words
    of another run or for another use cannot be repeated here.
    """

    def __init__(self, store: Any, secret: bytes | None, purpose: str) -> None:
        self._store, self._secret, self._purpose = store, secret, purpose
        self._warned = False

    def set(self, key: str, value: str) -> None:
        self._store.set(key, self._signed(key, value))

    def get_many(self, keys: list[str]) -> list[str]:
        """Values of keys that exist; `NOTHING` where the value is somebody else's."""
        found = self._store.multi_get(keys)
        values = [self._checked(key, raw) for key, raw in zip(keys, found, strict=True)]
        return [NOTHING if value is None else value for value in values]

    def compare_set(self, key: str, expected: str, value: str) -> str:
        """Write ``value`` if the key holds ``expected`` (empty: if it does not exist); what it holds then.

        What somebody else has written is replaced.
        """
        mine = self._signed(key, value)
        before = self._signed(key, expected) if expected else ""
        for _ in range(_ATTEMPTS):
            raw = self._store.compare_set(key, before, mine)
            found = self._checked(key, raw)
            if found is not None:
                return found
            before = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw
            try:
                before.encode()
            except UnicodeEncodeError:
                self._store.set(key, mine)  # it cannot be compared with
                return value
        return value

    def _signed(self, key: str, value: str) -> str:
        if self._secret is None:
            return value
        # Lengths first: no two pairs of key and value may read the same.
        text = f"{len(self._purpose)} {len(key)} {self._purpose}{key}{value}".encode()
        return f"{hmac.new(self._secret, text, hashlib.sha256).hexdigest()}:{value}"

    def _checked(self, key: str, raw: bytes) -> str | None:
        if self._secret is None:
            return raw.decode()
        text = raw[:_MOST_BYTES].decode("utf-8", "replace")
        _, _, value = text.partition(":")
        if len(raw) <= _MOST_BYTES and hmac.compare_digest(self._signed(key, value).encode(), raw):
            return value
        if not self._warned:
            self._warned = True
            logger.warning(
                "somebody without the secret writes into the store at which ranks meet (%s: %s); it is ignored, but "
                "ranks should meet in a private network",
                printable(key),
                printable(text),
            )
        return None
