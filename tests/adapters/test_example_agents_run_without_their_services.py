"""The agents of launch/ are built and run with everything but the services that hear, think and speak for them."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streamdiff.avatar.engine import AvatarEngine
from tests.adapters.leftovers import nothing_left
from tests.adapters.orange import ORANGE, Orange
from tests.avatar.tiny_avatar import tiny_motion

pytestmark = pytest.mark.slow  # whole frameworks, in real time

LAUNCH = Path(__file__).parents[2] / "launch"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def orange(*_: object, **__: object) -> AvatarEngine:
    return AvatarEngine(Orange(), motion=tiny_motion())


@pytest.mark.parametrize(("name", "says"), [("livekit_agent", "Commands"), ("pipecat_bot", "--avatar FILE")])
def test_help_says_how_to_run_it(name: str, says: str) -> None:
    command = [sys.executable, str(LAUNCH / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"python launch/{name}.py" in done.stdout
    assert says in done.stdout


def test_the_livekit_agent_speaks_in_a_room_until_its_session_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    from livekit.agents import AgentServer, AgentSession

    from tests.adapters.livekit_stage import Face, spoken
    from tests.adapters.rooms import FakeRoom

    for name in ("LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"):
        monkeypatch.setenv(name, "x" * 40)
    module = example("livekit_agent")
    monkeypatch.setattr(module.AvatarEngine, "load", orange)
    sessions: list[AgentSession[Any]] = []

    class Roomless(AgentSession[Any]):
        """Starts without LiveKit's own tracks in and out of a room, which need a server."""

        async def start(self, agent: Any, **_: object) -> None:  # type: ignore[override]
            await super().start(agent)
            sessions.append(self)

    async def main() -> None:
        threads = set(threading.enumerate())
        room, process = FakeRoom(), SimpleNamespace(userdata={})
        module.load(process)
        job = SimpleNamespace(room=room, proc=process, connect=lambda: asyncio.sleep(0))
        monkeypatch.setattr(module, "AgentSession", Roomless)
        async with asyncio.timeout(90):
            entry = asyncio.create_task(module.entrypoint(job))
            while not sessions and not entry.done():
                await asyncio.sleep(0.02)
            assert not entry.done(), await entry
            face = Face(SimpleNamespace(interrupt=None), room, sessions[0].output.audio)  # type: ignore[arg-type]
            await face.on_air()
            await sessions[0].say("Hello.", audio=spoken(0.6)).wait_for_playout()
            await face.heard(0.5)
            await sessions[0].aclose()
            await entry
        await room.aclose()
        await nothing_left(threads)

    assert isinstance(module.server, AgentServer)
    asyncio.run(main())


@pytest.mark.filterwarnings("ignore:.*will be removed in 2.0.0:DeprecationWarning")  # of Pipecat's own classes
def test_the_pipecat_bot_is_seen_by_its_caller_until_they_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
    from pipecat.runner.types import SmallWebRTCRunnerArguments
    from pipecat.transports.smallwebrtc.connection import SmallWebRTCConnection

    monkeypatch.setenv("OPENAI_API_KEY", "x" * 40)
    module = example("pipecat_bot")
    monkeypatch.setattr(module, "load", orange)

    async def main() -> None:
        caller = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        tracks: dict[str, Any] = {}
        caller.on("track", lambda track: tracks.__setitem__(track.kind, track))
        for kind in ("audio", "video"):
            caller.addTransceiver(kind, direction="sendrecv")
        caller.createDataChannel("messages")
        await caller.setLocalDescription(await caller.createOffer())
        connection = SmallWebRTCConnection()
        await connection.initialize(sdp=caller.localDescription.sdp, type="offer")
        answer = connection.get_answer()
        async with asyncio.timeout(90):
            bot = asyncio.create_task(module.bot(SmallWebRTCRunnerArguments(webrtc_connection=connection)))
            await caller.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
            pixels_HWC = np.zeros((1, 1, 3))
            while np.abs(pixels_HWC.reshape(-1, 3).mean(0) - ORANGE).max() > 12:
                assert not bot.done(), await bot
                pixels_HWC = (await tracks["video"].recv()).to_ndarray(format="rgb24")
            assert pixels_HWC.shape == (64, 64, 3)
            await caller.close()
            await connection.disconnect()
            await bot

    asyncio.run(main())
