"""A Pipecat bot with a face: open its page, talk to it, see it answer.

    pip install 'streamdiff[avatar,demo,pipecat]' 'pipecat-ai[runner,webrtc,silero]'
    export OPENAI_API_KEY=...
    python launch/pipecat_bot.py -t webrtc --avatar face.jpg           # http://localhost:7860; no --avatar: the demo's

Ears, mind and voice are OpenAI's; services of your choice go in their places.
"""

from __future__ import annotations

import argparse
import asyncio
import functools

from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.runner.types import SmallWebRTCRunnerArguments
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.services.openai.stt import OpenAISTTService
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.transports.base_transport import BaseTransport, TransportParams
from pipecat.transports.smallwebrtc.transport import SmallWebRTCTransport
from pipecat.workers.runner import WorkerRunner

from streamdiff import AvatarEngine
from streamdiff.adapters.pipecat import SessionVideoService
from streamdiff.session import Session

load = functools.cache(functools.partial(AvatarEngine.load, voice=None))
"""The face is loaded once for all callers."""


def conversation(transport: BaseTransport, face: Session) -> PipelineWorker:
    """Ears, mind, voice and face between a transport's ends."""
    context = LLMContext([{"role": "developer", "content": "You are friendly, and brief: one or two sentences."}])
    turns = LLMContextAggregatorPair(context, user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer()))
    seen = [OpenAITTSService(), SessionVideoService(face), transport.output()]
    heard = [transport.input(), OpenAISTTService()]
    return PipelineWorker(Pipeline([*heard, turns.user(), OpenAILLMService(), *seen, turns.assistant()]))


async def bot(arguments: SmallWebRTCRunnerArguments) -> None:
    """One caller."""
    engine = await asyncio.to_thread(load, getattr(arguments.cli_args, "avatar", None))
    (height, width), ends = engine.size, {"audio_in_enabled": True, "audio_out_enabled": True}
    video = {"video_out_width": width, "video_out_height": height, "video_out_framerate": engine.fps}
    params = TransportParams(**ends, video_out_enabled=True, video_out_is_live=True, **video)
    transport = SmallWebRTCTransport(arguments.webrtc_connection, params)
    async with engine.open() as face:
        worker = conversation(transport, face)

        @transport.event_handler("on_client_disconnected")
        async def _(*_: object) -> None:
            await worker.cancel()

        runner = WorkerRunner(handle_sigint=arguments.handle_sigint)
        await runner.add_workers(worker)
        await runner.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avatar", metavar="FILE", help="a photo, or a bundle of `streamdiff avatar`")
    try:
        from pipecat.runner.run import main
    except ImportError as error:
        parser.parse_known_args()  # answers --help
        parser.error(f"{error}")
    main(parser)
