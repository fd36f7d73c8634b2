"""Which addresses a process listens at."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"


def _sockets(process: str) -> set[str]:
    found: set[str] = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        try:
            found.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    return found


def _address(hexadecimal: str) -> str:
    """The kernel writes 32-bit words in the order of the processor."""
    raw = bytes.fromhex(hexadecimal)
    words = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    return str(ipaddress.ip_address(words))


def listening_at(process: int | None = None) -> Iterator[str]:
    """Addresses of all TCP sockets of a process, or of this one, that listen (Linux)."""
    name = "self" if process is None else str(process)
    mine = _sockets(name)
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{name}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in mine:
                yield _address(fields[1].partition(":")[0])
