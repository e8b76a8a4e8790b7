"""The paper's networks and the registry that makes any network by name.

Importing this package does not import torch: names are checked first, networks built later.
"""

from __future__ import annotations

from dml_fast.models.inputs import InputSpec
from dml_fast.models.registry import (
    check_code,
    check_model_name,
    create_model,
    model_names,
    names_code,
)

__all__ = [
    "InputSpec",
    "check_code",
    "check_model_name",
    "create_model",
    "model_names",
    "names_code",
]
