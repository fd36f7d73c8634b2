"""Run the evaluation: ``python perf/evaluate --head ict_facekit.npz --speech facegood_audio2rig.npz``."""

from __future__ import annotations

import sys
from pathlib import Path

# Started as a folder, Python looks for modules inside of it: this package and its neighbours are one floor up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluate.command import run

raise SystemExit(run())
