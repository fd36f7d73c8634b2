"""A mutant: a small fault in one file, and the test that is expected to fail because of it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Mutant:
    """``old`` stands exactly once in ``file``, a path inside the package; ``new`` takes its place."""

    file: str
    old: str
    new: str
    test: str
    """Where in `tests` the test is that kills it, as pytest names it."""

    @property
    def name(self) -> str:
        """File and the first words of what changes, in one line."""
        return f"{self.file}: {' '.join(self.old.split())[:60]}  ->  {' '.join(self.new.split())[:60]}"

    def mutated(self, source: str) -> str | None:
        """The source with the fault in it; None where the old text is gone, or stands there more than once."""
        return source.replace(self.old, self.new) if source.count(self.old) == 1 else None

    @property
    def fault(self) -> str | None:
        """What is wrong with this entry of the list, or None."""
        source = (ROOT / "streamdiff" / self.file).read_text()
        mutated = self.mutated(source)
        if mutated is None:
            return f"its old text stands {source.count(self.old)} times in the file"
        if mutated == source:
            return "it changes nothing"
        ast.parse(mutated)
        path, _, test = self.test.partition("::")
        file = ROOT / "tests" / path
        if not file.is_file() or f"def {test.partition('[')[0]}(" not in file.read_text():
            return f"there is no test {self.test}"
        return None
