"""All parsers of the command line, walked: every command, action and recipe with its options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from streamdiff.cli.main import parser
from streamdiff.cli.train import RECIPES
from streamdiff.options import Parser


def commands() -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Words of a command, and the parser of its options."""
    yield from _below((), parser())
    for name, recipe in RECIPES.items():
        add_arguments, _ = recipe.load()
        sub = Parser(prog=f"streamdiff train {name}")
        add_arguments(sub)
        yield ("train", name), sub


def _below(words: tuple[str, ...], of: argparse.ArgumentParser) -> Iterator[tuple[tuple[str, ...], Parser]]:
    nested = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    for action in nested:
        for name, sub in action.choices.items():
            yield from _below((*words, name), sub)
    if not nested and words != ("train",):
        assert isinstance(of, Parser)
        yield words, of


def options(of: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Options that take a value."""
    return (action for action in of._actions if action.option_strings and action.nargs != 0)
