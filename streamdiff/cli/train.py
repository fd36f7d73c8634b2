"""``streamdiff train RECIPE``: the table of recipes, and how one is found and run.

A recipe is one function that adds options to a parser and one that runs. Its module, and torch with it, is imported
when the recipe is asked for and not before.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from streamdiff import signals
from streamdiff.errors import ConfigError
from streamdiff.options import Parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Where a recipe is written: a module with one function that adds its options and one that runs it."""

    help: str
    module: str
    add_arguments: str = "add_arguments"
    run: str = "run"

    def load(self) -> tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]:
        """Import the module; its two functions."""
        module = importlib.import_module(f"streamdiff.training.{self.module}")
        return getattr(module, self.add_arguments), getattr(module, self.run)


VIDEO: Mapping[str, Recipe] = {
    "data": Recipe(help="clips to learn from: heads drawn with known truth, or your videos", module="data.make"),
    "codec": Recipe(help="a small causal video codec", module="codec"),
    "encode": Recipe(
        help="clips to latents, with a trained codec",
        module="codec",
        add_arguments="add_encode_arguments",
        run="run_encode",
    ),
    "forcing": Recipe(help="the video model: flow matching with diffusion forcing", module="forcing"),
    "consistency": Recipe(help="fewer steps: causal consistency", module="consistency"),
    "distil": Recipe(help="few steps: self-forcing distribution matching", module="matching"),
    "probe": Recipe(help="the network that reads drawn portraits, to judge by", module="probe"),
}
"""Recipes of the video model, in the order in which they are used."""
AVATAR: Mapping[str, Recipe] = {
    "motion": Recipe(help="how a face moves to sound and text: flow matching", module="avatar.motion"),
    "motion-consistency": Recipe(
        help="the same in two steps: consistency distillation",
        module="avatar.motion",
        add_arguments="add_consistency_arguments",
        run="run_consistency",
    ),
    "mouth": Recipe(help="the inside of a mouth, from pictures of a 3D head", module="avatar.mouth"),
    "seals": Recipe(help="closed lips: a detector of p, b and m in sound", module="avatar.seals"),
    "rig": Recipe(help="how landmarks move with ARKit shapes, from a 3D head", module="avatar.rig"),
    "fit": Recipe(help="one person's lower face and manner, from a video", module="avatar.fit"),
}
"""Recipes of the coefficient path, each by itself."""
RECIPES: Mapping[str, Recipe] = {**VIDEO, **AVATAR}


FORMATTER = argparse.RawDescriptionHelpFormatter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``streamdiff train``: those of a recipe are read by the recipe."""
    parser.add_argument("recipe", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of the recipe")


def _listed(recipes: Mapping[str, Recipe]) -> str:
    return "\n".join(f"  {name:<20}{recipe.help}" for name, recipe in recipes.items())


DESCRIPTION = (
    f"The video model, in this order:\n{_listed(VIDEO)}\n\nAvatars, each by itself:\n{_listed(AVATAR)}\n\n"
    "`streamdiff train RECIPE --help` says more."
)


def run(args: argparse.Namespace) -> int:
    """``streamdiff train``. Raises ConfigError for a recipe that does not exist."""
    if args.recipe not in RECIPES:
        raise ConfigError(f"there is no recipe {args.recipe!r}; choose from {', '.join(RECIPES)}")
    recipe = RECIPES[args.recipe]
    add_arguments, run = recipe.load()
    signals.handle()
    parser = Parser(prog=f"streamdiff train {args.recipe}", description=recipe.help[0].upper() + recipe.help[1:] + ".")
    add_arguments(parser)
    return run(parser.parse_args(args.arguments))
