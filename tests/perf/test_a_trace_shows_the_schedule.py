"""The traces of a real line of ranks become one picture, and their shares are those of the stream."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import profile_stream
import pytest
import torch

from streamdiff.pipeline.packet import Packet
from streamdiff.pipeline.run import run_local
from streamdiff.pipeline.schedule import plan
from streamdiff.trace import JsonLines

ROOT = Path(__file__).resolve().parents[2]
STEP_S, NUM_CHUNKS = 0.02, 8


class Sleeper:
    """A stage that takes its time; rank 1 twice as long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def step(self, packet: Packet) -> Packet:
        time.sleep(self.seconds)
        return replace(packet, latent_BCTHW=packet.latent_BCTHW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    schedule = plan(num_steps=2, num_ranks=3)
    stages = [Sleeper(STEP_S), Sleeper(2 * STEP_S), Sleeper(STEP_S)]
    source = (Packet(chunk=c, epoch=0, lead=4, latent_BCTHW=torch.zeros(1)) for c in range(NUM_CHUNKS))
    with contextlib.ExitStack() as stack:
        observers = [stack.enter_context(JsonLines(folder / f"rank{r}.jsonl", rank=r)) for r in range(3)]
        assert len(list(run_local(schedule, stages, source, observers=observers, deadline_s=30))) == NUM_CHUNKS
    return folder


def test_every_span_is_in_the_picture(folder: Path) -> None:
    lines = profile_stream.read(folder)
    trace = profile_stream.chrome_trace(lines)
    events = trace["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(lines)
    assert {event["pid"] for event in spans} == {0, 1, 2}
    assert {event["name"] for event in spans} == {"wait", "step", "send"}
    assert min(event["ts"] for event in spans) == 0
    assert all(event["dur"] >= 0 for event in spans)
    json.dumps(trace)


def test_an_arrow_follows_each_chunk_to_the_next_rank(folder: Path) -> None:
    events = profile_stream.chrome_trace(profile_stream.read(folder))["traceEvents"]
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert len(starts) == len(ends) == 2 * NUM_CHUNKS
    for identity, start in starts.items():
        assert ends[identity]["pid"] == start["pid"] + 1
        assert ends[identity]["ts"] >= start["ts"]
        assert ends[identity]["name"] == start["name"]


def test_the_shares_find_the_slowest_rank(folder: Path) -> None:
    lines = profile_stream.read(folder)
    facts = profile_stream.stream_facts(lines)
    assert facts["slowest_rank"] == 1
    assert facts["ranks"] == 3
    assert facts["chunks"] == NUM_CHUNKS
    # Sleeps are never shorter than asked for; how much longer is this machine's affair.
    assert facts["period_ms"] >= 0.9 * 2e3 * STEP_S
    assert facts["through_p50_ms"] >= 4e3 * STEP_S
    rows = {row["rank"]: row for row in profile_stream.shares(lines)}
    assert rows[1]["step_%"] > rows[2]["step_%"]
    assert rows[2]["wait_%"] > rows[1]["wait_%"]
    assert all(row["step_%"] + row["wait_%"] + row["send_%"] <= 101 for row in rows.values())


@pytest.mark.processes
def test_the_command_writes_the_trace(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "perf" / "profile_stream.py"), str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "stream.json").is_file()
    assert json.loads(done.stdout.splitlines()[-1])["bench"] == "stream"


def test_a_folder_without_traces_says_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make some with streamdiff generate --trace"):
        profile_stream.read(tmp_path)
    (tmp_path / "rank0.jsonl").write_text("not json\n")
    with pytest.raises(SystemExit, match=r"line 1 of .*rank0.jsonl is no span"):
        profile_stream.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("nvjet_hsh_128x256_64x4", "linear"),
        ("void cutlass::device_kernel<flash::enable_sm90>", "attention"),
        ("residual_norm_kernel", "norm and residual"),
        ("aten::_scaled_mm", "linear"),
        ("quantise_kernel", "eight bits"),
        ("qk_norm_rope_kernel", "ring"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("aten::silu", "other"),
    ],
)
def test_kernels_are_told_apart(name: str, word: str) -> None:
    assert profile_stream.word_of(name) == word
