"""What an adapter may not leave behind."""

from __future__ import annotations

import asyncio
import threading
import time


async def nothing_left(threads: set[threading.Thread]) -> None:
    """Fail unless all tasks but this one, and all threads but these, end."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < 20:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        # A dummy is a native thread of a library that has called into Python once: those are nobody's to end.
        left = {
            thread
            for thread in set(threading.enumerate()) - threads
            if "asyncio" not in thread.name and not isinstance(thread, threading._DummyThread)
        }
        if not tasks and not left:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"left running: {tasks} {left}")
