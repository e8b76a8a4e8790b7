"""Batches: how they are decoded, augmented and assembled. Importing this package loads torch."""

from dml_fast.data.loaders.evaluation import evaluation_batches
from dml_fast.data.loaders.opening import train_loader

__all__ = ["evaluation_batches", "train_loader"]
