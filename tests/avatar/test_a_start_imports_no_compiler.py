"""What `talk` loads before it speaks does not bring in torch's compiler, which takes a second of a processor."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.generate.processes import TIMEOUT_S, environment

_SCRIPT = """
import sys
from streamdiff.avatar.engine import AvatarEngine
from streamdiff.avatar.render import WarpRenderer
from tests.avatar.drawn_face import drawn_bundle
AvatarEngine(WarpRenderer(drawn_bundle()))
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_nothing_of_it_is_imported() -> None:
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
