"""The head of an HTTP request, as much of it as is needed to pass the request on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_HEAD_BYTES = 32_768
_LINE = re.compile(rb"(?P<method>[A-Z]{1,20}) (?P<target>[\x21-\x7e]{1,8192}) HTTP/1\.[01]")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_HOP = (b"connection", b"keep-alive", b"proxy-connection")


@dataclass(frozen=True, slots=True)
class Head:
    """One request, its body not yet read."""

    method: str
    target: str
    fields: tuple[tuple[bytes, bytes], ...]

    @property
    def path(self) -> str:
        """Of the target, without its query."""
        return urlsplit(self.target).path if self.target.startswith("/") else ""

    @property
    def upgrades(self) -> bool:
        """Whether the connection becomes a WebSocket."""
        return self.get("upgrade").lower() == "websocket"

    @property
    def body_bytes(self) -> int | None:
        """Size of the body; None: it says so itself as it comes."""
        if self.get("transfer-encoding"):
            return None
        size = self.get("content-length") or "0"
        return int(size) if size.isascii() and size.isdigit() and len(size) < 16 else None

    def get(self, name: str) -> str:
        """The first value of a header field; empty: it is not there."""
        wanted = name.encode()
        return next((value.decode("latin-1").strip() for key, value in self.fields if key.lower() == wanted), "")

    def passed_on(self) -> bytes:
        """The head for the next server: the connection is for this request alone."""
        kept = [key + b": " + value for key, value in self.fields if key.lower() not in _HOP]
        kept.append(b"Connection: " + (b"Upgrade" if self.upgrades else b"close"))
        line = f"{self.method} {self.target} HTTP/1.1".encode("ascii")
        return b"\r\n".join([line, *kept, b"", b""])


def parse_head(data: bytes) -> Head | None:
    """The head of a request, its empty line included; None: it is none, or not one that two servers read alike."""
    line, *lines = data.removesuffix(b"\r\n\r\n").split(b"\r\n")
    found = _LINE.fullmatch(line)
    fields = [_FIELD.fullmatch(field) for field in lines]
    if found is None or not all(fields):
        return None
    head = Head(
        found["method"].decode(),
        found["target"].decode(),
        tuple((field[1], field[2].rstrip()) for field in fields if field is not None),
    )
    sizes = {value for key, value in head.fields if key.lower() in (b"content-length", b"transfer-encoding")}
    return None if len(sizes) > 1 else head
