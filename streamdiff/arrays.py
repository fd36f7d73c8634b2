"""Types of numpy arrays; a tensor or an array says its axes in its name (``motion_AE``), not in its type."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]
"""Real numbers of any width."""
