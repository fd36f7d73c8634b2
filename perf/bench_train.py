"""What training the small model costs, and what serving it costs.

    python perf/bench_train.py                      on a GPU where there is one
    python perf/bench_train.py --device cpu         on one CPU thread
    python perf/bench_train.py --device cpu | python perf/table.py --keep train

Rows: one step of each recipe of the portrait preset (gradients, as its task computes them, on clips of noise: time does
not depend on what is shown), and a second of served video, denoised and decoded. Tokens are those of the clips of a
batch; a rollout passes over each once per denoising step besides. A step of `distil` is the mean of one that moves the
student and of those between, which teach the critic alone. CPU times are of the thread, so that other work on the
machine disturbs them little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine_card, report, time_call
from safetensors.torch import save_file

from streamdiff import presets
from streamdiff.config import EngineConfig
from streamdiff.engine import Engine
from streamdiff.models.audio import chunks
from streamdiff.models.text import HashedText
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan
from streamdiff.training.codec import Codec, CodecTask
from streamdiff.training.data.clip import RATE_HZ
from streamdiff.training.data.shards import Shards
from streamdiff.training.forcing import ForcingConfig, ForcingTask, random_dit
from streamdiff.training.latents import LatentClips
from streamdiff.training.loop import Task
from streamdiff.training.matching import MatchingConfig, MatchingTask

_CLIPS = 16


def noise_clips(folder: Path, config: EngineConfig) -> None:
    """Clips of noise, as pictures and as latents."""
    generator = torch.Generator().manual_seed(0)
    assert config.dit.audio is not None
    T, C, (H, W) = 24, config.dit.in_dim, config.latent_hw
    heard = (config.dit.audio.num_features, config.dit.audio.feature_dim, T * config.vae.temporal_factor)
    latents = {
        "latent": torch.randn(_CLIPS, C, T, H, W, generator=generator).half(),
        "reference": torch.randn(_CLIPS, C, H, W, generator=generator).half(),
        "audio": torch.randn(_CLIPS, *heard, generator=generator).half(),
        "prompt": torch.zeros(_CLIPS, dtype=torch.int64),
    }
    save_file(latents, folder / "latents.safetensors", metadata={"prompts": '["A person is talking."]'})
    frames = torch.randint(0, 256, (2, 29, config.height, config.width, 3), generator=generator, dtype=torch.uint8)
    pictures = {"frames": frames, "photo": frames[:, 0], "sound": torch.zeros(2, 29 * 640, dtype=torch.int16)}
    save_file({k: v.contiguous() for k, v in pictures.items()}, folder / "faces-00000.safetensors",
              metadata={"prompts": json.dumps(["", ""])})  # fmt: skip


def step_rows(config: EngineConfig, folder: Path, device: torch.device, *, budget_s: float) -> list[dict[str, Any]]:
    """A step of each recipe."""
    bf16, batch = True, 8
    clips = LatentClips(folder, config, HashedText(config.dit.text_dim, max_tokens=config.dit.text_len))
    forcing = ForcingConfig()
    tokens = batch * forcing.num_chunks * config.chunk_tokens
    dits = [random_dit(config, seed=k).to(device) for k in range(3)]
    for dit in dits:
        for name, parameter in dit.named_parameters():
            parameter.requires_grad_(not (name.startswith("frame_packer.") or name == "cond_encoder.weight"))
    teacher = dits[2].requires_grad_(requires_grad=False)
    codec = Codec(config.vae).to(device)
    learned: list[tuple[str, Task, int, int]] = [
        ("codec", CodecTask(codec, Shards(folder), batch=6, latents=5, lr=1e-4, seed=0), 1, 0),
        ("forcing", ForcingTask(dits[0], clips, config, forcing, batch=batch, lr=1e-3, seed=0, bf16=bf16), 1, tokens),
        ("distil", MatchingTask(dits[0], dits[1], teacher, clips, config, MatchingConfig(), batch=batch, lr=1e-4,
                                seed=0, bf16=bf16), MatchingConfig().student_every, tokens),
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name, task, period, num_tokens in learned:

        def steps(task: Task = task, period: int = period) -> None:
            for step in range(period):
                for part in task.parts.values():
                    part.module.zero_grad(set_to_none=True)
                task.gradients(step)

        timing = time_call(steps, device, warmup=1, budget_s=budget_s, flush=False, clock="thread")
        step_s = timing.p50 / 1e3 / period
        row: dict[str, Any] = {"row": f"{name} step", "s": step_s}
        if num_tokens:
            row["tokens_per_s"] = num_tokens / step_s
        rows.append(row)
    return rows


def served_row(device: torch.device, *, seconds: float) -> dict[str, Any]:
    """Processor time (on a GPU: wall time) of a second of video, one rank, the preset's own weights."""
    engine = Engine(presets.portrait(), device=device)
    config = engine.config
    schedule = plan(num_steps=config.num_steps, num_ranks=1, refresh_chunk=config.refresh_chunk)
    stage = engine.stage(schedule.roles[0], seed=0)
    head = engine.intake(torch.full((config.height, config.width, 3), 128, dtype=torch.uint8), "A person is talking.")
    sound_S = 0.1 * torch.randn(int(seconds * RATE_HZ), generator=torch.Generator().manual_seed(0))
    heard = chunks([sound_S], engine.audio_encoder(), frames_per_chunk=config.video_frames_per_chunk, fps=config.fps)
    now = time.perf_counter if device.type == "cuda" else time.process_time
    marks = [now()]
    for packet in run_local(schedule, [stage], head.packets(heard)):
        assert packet.frames_THWC is not None
        marks.append(now())
    each = sorted(b - a for a, b in itertools.pairwise(marks[2:]))
    return {"row": "a second of video, served", "s": each[len(each) // 2] / config.chunk_s}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of steps per row (default: %(default)s)")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = presets.portrait()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        noise_clips(Path(folder), config)
        rows = step_rows(config, Path(folder), device, budget_s=args.budget)
    rows.append(served_row(device, seconds=12.0))
    report("train", "Training and serving the portrait preset", rows, machine_card(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
