"""All mutants."""

from __future__ import annotations

from tests.mutants import flow, line, memory, pipeline, session

MUTANTS = (*memory.MUTANTS, *flow.MUTANTS, *pipeline.MUTANTS, *session.MUTANTS, *line.MUTANTS)
