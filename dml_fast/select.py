"""Which rows to label next, and which labels to doubt: ``python -m dml_fast.select RUN``."""

from __future__ import annotations

from dml_fast.selection.scores import Scores as Scores
from dml_fast.selection.scores import acquire as acquire
from dml_fast.selection.scores import pool_scores as pool_scores
