"""Small engines of both paths, and what tests of sessions do with them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from typing import Any

import numpy as np
import torch

from streamdiff.avatar.engine import AvatarEngine
from streamdiff.config import AudioInjectionConfig
from streamdiff.engine import Engine
from streamdiff.session import Opening, Session
from streamdiff.stream import Shown
from tests.avatar.tiny_avatar import Bars, Tones, tiny_motion
from tests.engine.stream_case import small_config

LIMIT_S = 60.0


def video_engine(slack: int = 3) -> Engine:
    config = small_config(2)
    audio = AudioInjectionConfig(feature_dim=64, num_features=3, num_tokens=2, inject_layers=(0,))
    return Engine(
        dataclasses.replace(
            config,
            dit=dataclasses.replace(config.dit, audio=audio),
            memory=dataclasses.replace(config.memory, slack_chunks=slack),
        )
    )


def open_video(engine: Engine | None = None, *, slack: int | None = None, live: bool = False, **how: Any) -> Opening:
    engine = engine or video_engine()
    image_HWC = np.zeros((engine.config.height, engine.config.width, 3), np.uint8)
    how.setdefault("stream", 0)
    return engine.open(image_HWC, "a person talks", live=live, slack_chunks=slack, **how)


def open_avatar(*, live: bool = False, **how: Any) -> Opening:
    return AvatarEngine(Bars(), voice=Tones(), motion=tiny_motion()).open(realtime=live, **how)


def tone(seconds: float, seed: int = 0, rate_hz: int = 16_000) -> np.ndarray:
    return (0.3 * np.sin(np.arange(int(rate_hz * seconds)) * (0.1 + 0.03 * seed))).astype(np.float32)


async def collect(session: Session, count: int | None = None) -> list[Shown]:
    shown: list[Shown] = []
    async for some in session:
        shown.append(some)
        if len(shown) == count:
            break
    return shown


def run(scene: Coroutine[Any, Any, None]) -> None:
    torch.set_num_threads(1)
    asyncio.run(asyncio.wait_for(scene, LIMIT_S))
