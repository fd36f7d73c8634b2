"""One script, written against `Session` alone, drives a video model and facial coefficients; pyright checks it too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from streamdiff.session import Opening, Session
from streamdiff.stream import Can, Interrupted, Shown, State
from tests.session.faces import open_avatar, open_video, run, tone


async def conversation(session: Session) -> tuple[list[Shown], Interrupted]:
    """A live face waits, speaks, is interrupted, speaks again, and ends."""
    shown: list[Shown] = []

    async def watch(until_s: float) -> None:
        async for some in session:
            shown.append(some)
            if some.pts + len(some.frames_THWC) / session.fps >= until_s or some.ends_segment:
                return

    await watch(0.4)
    if Can.LISTEN in session.can:
        session.listen(True)
    session.push_audio(tone(4.0, rate_hz=session.rate_hz), session.rate_hz)
    if Can.LISTEN in session.can:
        session.listen(False)
    await watch(2.0)
    interrupted = session.interrupt()
    again = session.push_audio(tone(0.9, 1, rate_hz=session.rate_hz), last=True)
    if Can.PROMPT in session.can:
        await session.prompt("a person nods")
    while not again.done:
        await watch(60.0)
    session.finish()
    async for some in session:
        shown.append(some)
    return shown, interrupted


@pytest.mark.heavy
@pytest.mark.parametrize("open_face", [open_video, open_avatar], ids=["video", "avatar"])
def test_the_same_script_drives_it(open_face: Callable[..., Opening]) -> None:
    async def scene() -> None:
        async with open_face(live=True) as session:
            shown, interrupted = await asyncio.wait_for(conversation(session), 50)
        step = len(shown[0].frames_THWC)
        assert step == (12 if Can.PROMPT in session.can else 1)
        assert [s.index for s in shown] == [step * n for n in range(len(shown))]
        assert all(len(s.sound_S) * session.fps == session.rate_hz * step for s in shown)
        assert all(s.frames_THWC.shape == (step, *session.size, 3) for s in shown)
        assert interrupted.segment == 1
        assert interrupted.resumes_s == interrupted.cut_s
        assert shown[0].state is State.IDLE
        assert {s.segment for s in shown if s.epoch == 1 and not s.is_silence} == {2}
        heard_S = np.concatenate([s.sound_S for s in shown if s.segment == 2])
        loudest = 0.9 * session.rate_hz
        assert np.count_nonzero(heard_S) == pytest.approx(loudest, abs=session.rate_hz / 50)
        assert [s.ends_segment for s in shown if s.segment == 2][-1]  # idle chunks that were under way may follow

    run(scene())
