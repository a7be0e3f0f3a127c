"""Data sets: what they are, how they are read, and how batches are made of them.

`load` reads a whole data set into arrays. A data set in `STREAMED` is too large for that:
`data.streaming` reads it while the network trains.
"""

from synflow_jax.data.arrays import Arrays as Arrays
from synflow_jax.data.augmentation import augment as augment
from synflow_jax.data.augmentation import normalise as normalise
from synflow_jax.data.batches import prune_batches as prune_batches
from synflow_jax.data.readers import check_readable as check_readable
from synflow_jax.data.readers import load as load
from synflow_jax.data.specs import DATASETS as DATASETS
from synflow_jax.data.specs import STREAMED as STREAMED
from synflow_jax.data.specs import DataSpec as DataSpec
from synflow_jax.data.specs import ImageShape as ImageShape
from synflow_jax.data.specs import spec as spec
