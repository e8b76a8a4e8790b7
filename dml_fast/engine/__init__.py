"""The step of a cohort: students, how they are run side by side, and what one step gives."""

from __future__ import annotations

from dml_fast.engine.cohort import Cohort
from dml_fast.engine.executor import Executor, Sequential, StepResult
from dml_fast.engine.features import FeatureLoss
from dml_fast.engine.graph import Graph
from dml_fast.engine.precision import Precision
from dml_fast.engine.step import Engine
from dml_fast.engine.streams import Streams
from dml_fast.engine.student import Student
from dml_fast.engine.teacher import Teacher
from dml_fast.engine.threads import Threads

__all__ = [
    "Cohort",
    "Engine",
    "Executor",
    "FeatureLoss",
    "Graph",
    "Precision",
    "Sequential",
    "StepResult",
    "Streams",
    "Student",
    "Teacher",
    "Threads",
]
