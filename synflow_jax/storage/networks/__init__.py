"""Networks as files for others: self-describing safetensors, a program of `jax.export`, PyTorch's names.

Every function takes a network as (model, params, batch_stats, mask, input_shape), full or compact: a `Bundle` is those
five, and reading gives one.
"""

from synflow_jax.storage.networks.bundle import Bundle as Bundle
from synflow_jax.storage.networks.bundle import load as load
from synflow_jax.storage.networks.bundle import save as save
from synflow_jax.storage.networks.program import to_jax as to_jax
from synflow_jax.storage.networks.pytorch import from_torch as from_torch
from synflow_jax.storage.networks.pytorch import read_variables as read_variables
from synflow_jax.storage.networks.pytorch import save_torch as save_torch
from synflow_jax.storage.networks.pytorch import to_torch as to_torch
from synflow_jax.storage.networks.pytorch import torch_names as torch_names
