"""Multi-GPU, pipeline-parallel streaming diffusion for live avatars."""

from __future__ import annotations

__version__ = "0.1.0"
