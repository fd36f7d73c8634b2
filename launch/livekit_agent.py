"""A LiveKit agent with a face: it joins a room, listens, answers, and is seen.

    pip install 'streamdiff[avatar,demo,livekit]'
    export LIVEKIT_URL=wss://... LIVEKIT_API_KEY=... LIVEKIT_API_SECRET=...
    STREAMDIFF_AVATAR=face.jpg python launch/livekit_agent.py dev      # no STREAMDIFF_AVATAR: the face of the demo

Then join a room of that project with any client, such as agents-playground.livekit.io. Ears, mind and voice are models
of LiveKit Inference; plugins of your choice go in their places.
"""

from __future__ import annotations

import asyncio
import os
import sys

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, JobProcess, cli
from livekit.agents.voice.avatar import QueueAudioOutput

from streamdiff import AvatarEngine
from streamdiff.adapters.livekit import attend, on_air


def load(process: JobProcess) -> None:
    """Load the face, once per process: jobs begin at once."""
    process.userdata["engine"] = AvatarEngine.load(os.environ.get("STREAMDIFF_AVATAR"), voice=None)


server = AgentServer(setup_fnc=load, initialize_process_timeout=60.0)


@server.rtc_session()
async def entrypoint(job: JobContext) -> None:
    """One room."""
    engine: AvatarEngine = job.proc.userdata["engine"]
    await job.connect()
    agent = AgentSession(stt="deepgram/nova-3", llm="openai/gpt-4.1-mini", tts="cartesia/sonic-3")
    output = QueueAudioOutput(sample_rate=engine.rate_hz, wait_playback_start=True)
    over = asyncio.Event()
    agent.on("close", lambda _: over.set())
    async with engine.open() as face, on_air(face, job.room, output):
        agent.output.audio = output
        attend(face, agent)
        await agent.start(Agent(instructions="You are friendly, and brief: one or two sentences."), room=job.room)
        await over.wait()


if __name__ == "__main__":
    if "--help" in sys.argv[1:]:
        print(__doc__)
    cli.run_app(server)
