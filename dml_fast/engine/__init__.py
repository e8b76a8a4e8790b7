"""The step of a cohort: students, how they are run side by side, and what one step gives."""

from __future__ import annotations

from dml_fast.engine.step import Engine, StepResult

__all__ = ["Engine", "StepResult"]
