"""Any string becomes a row per word and an end mark; the same string always the same rows."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdiff.errors import ConfigError
from streamdiff.models.text import HashedText, TextEncoder


@pytest.mark.heavy
@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_unicode_has_finite_rows_of_unit_scale(prompt: str) -> None:
    rows_BPC = HashedText(256).encode(prompt)
    B, P, C = rows_BPC.shape
    assert (B, C) == (1, 256)
    assert 1 <= P <= len(prompt) * 4 + 1
    assert torch.equal(rows_BPC, HashedText(256).encode(prompt))
    root_mean_square_P = rows_BPC[0].square().mean(-1).sqrt()
    assert bool(((root_mean_square_P > 0.6) & (root_mean_square_P < 1.7)).all())


def test_the_interface_is_the_one_of_a_text_encoder() -> None:
    encoder: TextEncoder = HashedText(64)
    assert encoder.text_dim == 64
    assert encoder.encode("").shape == (1, 1, 64)
    assert encoder.encode("A woman speaks.").shape == (1, 5, 64)
    assert encoder.encode("女人说话").shape == (1, 5, 64)


def test_case_and_space_do_not_matter_but_words_and_order_do() -> None:
    encode = HashedText(128).encode
    assert torch.equal(encode("A  Woman\nspeaks"), encode("a woman speaks"))
    assert not torch.equal(encode("a woman speaks"), encode("a woman sings"))
    assert not torch.equal(encode("dog bites man"), encode("man bites dog"))


def test_a_word_moves_with_its_position_but_stays_itself() -> None:
    rows_PC = HashedText(1024).encode("smile smile anger")[0]
    similar = torch.cosine_similarity(rows_PC[0], rows_PC[1], dim=0)
    different = torch.cosine_similarity(rows_PC[0], rows_PC[2], dim=0)
    assert not torch.equal(rows_PC[0], rows_PC[1])
    assert similar > 0.7 > 0.5 > different


def test_words_that_share_letters_share_direction() -> None:
    encoder = HashedText(2048)
    speaking, speaks, tractor = (encoder.encode(word)[0, 0] for word in ("speaking", "speaks", "tractor"))
    assert torch.cosine_similarity(speaking, speaks, dim=0) > 0.15 + torch.cosine_similarity(speaking, tractor, dim=0)


def test_long_prompts_are_cut_and_keep_their_end_mark() -> None:
    encoder = HashedText(32, max_tokens=16)
    assert encoder.encode("word " * 1000).shape == (1, 16, 32)
    ends = [HashedText(32, max_tokens=n).encode("word " * 1000)[0, -1] for n in (8, 16)]
    assert not torch.equal(ends[0], encoder.encode("word " * 1000)[0, 7]), "row 7 is still a word"
    assert torch.cosine_similarity(ends[0], ends[1], dim=0) > 0.5


@pytest.mark.processes
def test_another_process_makes_the_same_rows() -> None:
    prompt = "Une femme parle doucement. 👩🏽‍🚀"
    program = (
        "import hashlib; from streamdiff.models.text import HashedText; "
        f"print(hashlib.sha256(HashedText(96).encode({prompt!r}).numpy().tobytes()).hexdigest())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
    ).stdout.strip()
    assert printed == hashlib.sha256(HashedText(96).encode(prompt).numpy().tobytes()).hexdigest()


def test_impossible_widths_say_so() -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        HashedText(0)
