"""What the README shows runs as it stands, and every file it names is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from streamdiff.cli.main import parser

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [line.split("   #")[0].strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (0, r"0 \(12, 128, 128, 3\) 7680"),
        (1, r"\(256, 256, 3\) 960 InterruptReport\(epoch=1, segment_id=1, played_s=1\."),
    ],
)
def test_the_python_examples_run(number: int, says: str) -> None:
    pytest.importorskip("matplotlib", reason="the demo's photograph comes with it")
    if number == 1:
        pytest.importorskip("hibari", reason="the voice comes with it")
    examples = blocks("python")
    assert len(examples) == 2
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    result = subprocess.run(
        [sys.executable, "-c", examples[number]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert re.match(says, result.stdout)


@pytest.mark.parametrize("command", [c for c in commands() if "streamdiff" in c])
def test_every_command_is_understood(command: str) -> None:
    words = shlex.split(command)
    arguments = words[words.index("streamdiff") + 1 :]
    assert parser().parse_args(arguments).command == arguments[0]


@pytest.mark.parametrize("script", [c for c in commands() if c.startswith("bash ")])
def test_every_script_is_there_and_reads(script: str) -> None:
    path = ROOT / shlex.split(script)[1]
    assert path.is_file()
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_every_path_exists() -> None:
    named = set(re.findall(r"`((?:streamdiff|kernels|launch|tests|perf)/[\w./-]+)`", README))
    named |= set(re.findall(r"\]\(([\w./-]+\.md)\)", README))
    named |= set(re.findall(r"(?:pytest|python)(?: -m \w+)? ((?:tests|perf)/[\w./-]+)", README))
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
