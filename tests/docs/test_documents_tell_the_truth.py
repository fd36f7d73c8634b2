"""What the documents show runs as it stands, and every file they name is there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streamdiff.cli.main import parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = tuple(
    sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.md", "streamdiff/*/README.md", "perf/*.md", "perf/results/*.md", "kernels/*.md")
        for path in ROOT.glob(pattern)
    )
)
README = "README.md"
SLOW = ("torchrun", "bash launch/quickstart.sh", "streamdiff")
"""Commands of the README that take longer than a default test may."""
EXAMPLES = {
    README: r"0 \(12, 128, 128, 3\) 7680",
    "streamdiff/avatar/README.md": r"\(1, 256, 256, 3\) 960 Interrupted\(epoch=1, segment=1, played_s=1\.",
    "kernels/README.md": "",
}
"""What their Python examples print first."""


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(document), flags=re.DOTALL)


def commands(document: str) -> list[str]:
    joined = "\n".join(blocks(document, "bash")).replace("\\\n", " ")
    return [line.split("   #")[0].strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **extra}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Launch scripts with an environment that has everything installed; nothing is installed into it."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    python = shlex.quote(sys.executable)
    for name, script in {
        "python": f'case "$*" in *pip*) exit 9 ;; esac\nexec {python} "$@"',
        "streamdiff": f'exec {python} -m streamdiff "$@"',
        "torchrun": f'exec {python} -m torch.distributed.run "$@"',
    }.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (bin_folder / name).chmod(0o755)
    kind = subprocess.run(["cksum", "pyproject.toml"], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / ".venv" / f".installed-demo-{kind.stdout.split()[0]}").touch()
    (tmp_path / "out").mkdir()
    return tmp_path


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(text(README).split()) < 1000
    assert text(README).count("![") == 2
    assert len(blocks(README, "python")) == 1


@pytest.mark.processes
@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow) if c.startswith(SLOW) else c for c in commands(README)]
)
def test_every_command_of_the_readme_makes_what_it_says(command: str, checkout: Path) -> None:
    pytest.importorskip("matplotlib", reason="the demo's photograph comes with it")
    pytest.importorskip("hibari", reason="the voice comes with it")
    path = f"{checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    films = re.findall(r"out/\w+\.mp4", command) or ["out/quickstart.mp4", "out/talk.mp4"]
    assert [film for film in films if (checkout / film).stat().st_size < 20_000] == []


@pytest.mark.processes
@pytest.mark.parametrize(
    "document", [pytest.param(d, marks=pytest.mark.slow) if "conversation" not in d else d for d in EXAMPLES]
)
def test_the_python_example_runs(document: str) -> None:
    pytest.importorskip("matplotlib", reason="the demo's photograph comes with it")
    if "talk" in text(document):
        pytest.importorskip("hibari", reason="the voice comes with it")
    (example,) = blocks(document, "python")
    done = subprocess.run(
        [sys.executable, "-c", example],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(EXAMPLES[document], done.stdout)


def test_no_document_shows_an_example_that_nobody_runs() -> None:
    # By test_the_routes_of_contributing_work.py and tests/serve/test_a_program_talks_to_a_face_in_ten_lines.py.
    followed = {"CONTRIBUTING.md", "streamdiff/serve/README.md"}
    assert {document for document in DOCUMENTS if blocks(document, "python")} <= EXAMPLES.keys() | followed


@pytest.mark.parametrize(
    ("document", "command"),
    [(document, c) for document in DOCUMENTS for c in commands(document) if re.search(r"(^|-m )streamdiff ", c)],
)
def test_every_command_is_understood(document: str, command: str) -> None:
    words = shlex.split(command)
    arguments = words[words.index("streamdiff") + 1 :]
    assert parser().parse_args(arguments).command == arguments[0]


@pytest.mark.processes
@pytest.mark.parametrize("script", sorted({c for d in DOCUMENTS for c in commands(d) if c.startswith("bash ")}))
def test_every_script_is_there_and_reads(script: str) -> None:
    path = ROOT / shlex.split(script)[1]
    assert path.is_file()
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    shown = text(document)
    folder = (ROOT / document).parent
    named = {ROOT / path for path in re.findall(r"`((?:streamdiff|kernels|launch|tests|perf|docs)/[\w./-]+)`", shown)}
    named |= {ROOT / path for path in re.findall(r"(?:pytest|python)(?: -m \w+)? ((?:tests|perf)/[\w./-]+)", shown)}
    prose = re.sub(r"```.*?```", "", shown, flags=re.DOTALL)
    named |= {folder / link for link in re.findall(r"\]\((?!https?:)([\w./-]+)", prose)}
    assert [path for path in sorted(named) if not path.exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_within_a_document_leads_to_a_heading(document: str) -> None:
    for target, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", text(document)):
        path = (ROOT / document).parent / target if target else ROOT / document
        titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
