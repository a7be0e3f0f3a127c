"""Data sets: what they are, how they are read, and how a training batch is made of them on the device."""

from synflow_jax.data.augmentation import augment, normalise
from synflow_jax.data.batches import prune_batches
from synflow_jax.data.readers import Arrays, check_readable, load
from synflow_jax.data.specs import DATASETS, STREAMED, DataSpec, ImageShape, spec

__all__ = [
    "DATASETS",
    "STREAMED",
    "Arrays",
    "DataSpec",
    "ImageShape",
    "augment",
    "check_readable",
    "load",
    "normalise",
    "prune_batches",
    "spec",
]
