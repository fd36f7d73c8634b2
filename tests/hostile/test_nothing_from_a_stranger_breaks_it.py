"""Whatever is given to a command: exit status 2 and one line, or a sensible result; in 10 s of CPU time and 1 GiB.

Cases are made by generators (`tests/hostile/pictures.py` and its neighbours). Each runs in a process of its own
(`tests/hostile/jail.py`), which counts time, memory, and what it reached for.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamdiff.errors import InputError
from tests.hostile import texts
from tests.hostile.case import Case, run
from tests.hostile.jail import Jail

KINDS = {"pictures": 250, "sounds": 350, "weights": 260, "options": 450, "texts": 20}
"""What strangers give, and how many cases of it there are at least."""


@pytest.fixture(scope="module")
def jail() -> Iterator[Jail]:
    with Jail() as jail:
        yield jail


def cases_of(kind: str) -> Iterator[Case]:
    yield from importlib.import_module(f"tests.hostile.{kind}").cases()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_in_one_line_or_something_sensible_comes_of_it(kind: str, jail: Jail, tmp_path: Path) -> None:
    names: set[str] = set()
    faults: list[str] = []
    for case in cases_of(kind):
        assert case.name not in names, "two cases have one name"
        names.add(case.name)
        if fault := run(jail, case, tmp_path / "case"):
            faults.append(f"{case.name}: {fault}")
    assert len(names) >= KINDS[kind]
    assert faults == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_text_is_heard_soon_and_read_in_bounded_time() -> None:
    """CPU time: before the first sound, or the refusal; and of reading each of the first sentences."""
    from streamdiff.voice import HibariVoice
    from streamdiff.voice.phonemes import Reader
    from streamdiff.voice.text import sentences

    voice, reader, slow = HibariVoice(), Reader(), list[str]()
    for name, text in texts.texts().items():
        began_s = time.process_time()
        with contextlib.suppress(InputError):
            next(voice.speak(text))
        if (took_s := time.process_time() - began_s) > 2.0:
            slow.append(f"{name}: {took_s:.1f} s to the first sound")
        for sentence in itertools.islice(sentences(text), 6):
            began_s = time.process_time()
            reader.phonemes(sentence)
            if (took_s := time.process_time() - began_s) > 1.0:
                slow.append(f"{name}: {took_s:.1f} s for {sentence[:40]!r}")
    assert slow == []
