"""Every number on every command line has a kind and a range; what is none of it is refused by name, in one line."""

from __future__ import annotations

import argparse

import pytest

from streamdiff.errors import ConfigError
from streamdiff.options import SEED, Number, Parser, Whole, duration_s, part
from tests.hostile.commands import commands, options

NO_WHOLE = [
    "",
    " ",
    "1.5",
    "1e3",
    "nan",
    "inf",
    "0x10",
    "1_000",
    "\u0661\u0662",
    "\u00b2",
    "\u00bd",
    "--",
    "1 ",
    "9" * 30,
]
NO_NUMBER = [
    "",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e999",
    "infinity",
    "1_0",
    "0x1p3",
    "\u0661",
    "1,5",
    "1e",
    ".",
    "9" * 400,
]


def test_every_number_has_a_range() -> None:
    numbers = 0
    for words, parser in commands():
        for action in options(parser):
            assert action.type not in (int, float) or action.choices, (words, action.option_strings)
            numbers += isinstance(action.type, Whole | Number)
    assert numbers > 80, "the walk has lost its way"


def test_every_default_is_what_may_be_given() -> None:
    for words, parser in commands():
        for action in options(parser):
            if isinstance(action.type, Whole | Number) and action.default is not None:
                assert action.type(str(action.default)) == action.default, (words, action.option_strings)


@pytest.mark.parametrize("text", NO_WHOLE)
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"a whole number in 0\.\.9223372036854775807"):
        SEED(text)


@pytest.mark.parametrize("text", NO_NUMBER)
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"a number in -1e\+308"):
        Number(-1e308, 1e308)(text)


def test_a_range_has_its_ends() -> None:
    assert [Whole(-2, 3)(text) for text in ("-2", "+3", "0")] == [-2, 3, 0]
    assert [Number(0, 2.5)(text) for text in ("0", "2.5", "1e-3", ".5")] == [0, 2.5, 0.001, 0.5]
    for text in ("-3", "4"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"-2\.\.3, got"):
            Whole(-2, 3)(text)
    for text in ("0", "-0", "0e5", "2.6", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"a positive number, at most 2\.5, got"):
            Number(0, 2.5, above=True)(text)


@pytest.mark.parametrize(
    "text", ["", "0s", "-5s", "nan", "1e9h", "8785h", "0.5s", "5", "5 days", "\u0665s", "infs", "5\ns"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must look like 10min"):
        duration_s(text)
    assert duration_s("8784h") == 366 * 86_400


@pytest.mark.parametrize(
    "text", ["", "1", "2/2", "-1/2", "0/0", "/", "0/1/2", "\u0660/\u0662", "0/99999999", "0 / 2", "a/b"]
)
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        part(text)


def test_an_error_is_one_line_that_names_the_option() -> None:
    parser = Parser(prog="streamdiff try")
    parser.add_argument("--steps", type=Whole(1, 50))
    with pytest.raises(ConfigError) as caught:
        parser.parse_args(["--steps", "0\n\x1b[31m"])
    assert str(caught.value) == (
        "argument --steps: must be a whole number in 1..50, got '0\\\\n\\\\x1b[31m'; see streamdiff try --help"
    )
