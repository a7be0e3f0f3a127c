"""Networks as files for others: safetensors, a program of `jax.export`, PyTorch's state dict.

Every function takes or returns a `models.Network`, full or compact.

    network = networks.load("net.safetensors")             # our own format: all of the record
    program = networks.to_jax(network)                     # runs without this package
    state = networks.to_torch(network)                     # loads into a torch.nn.Module
    network = networks.from_torch("vgg16.npz", "cifar_vgg16_bn")
"""

from synflow_jax.storage.networks.native import load as load
from synflow_jax.storage.networks.native import save as save
from synflow_jax.storage.networks.program import to_jax as to_jax
from synflow_jax.storage.networks.pytorch import from_torch as from_torch
from synflow_jax.storage.networks.pytorch import read_variables as read_variables
from synflow_jax.storage.networks.pytorch import save_torch as save_torch
from synflow_jax.storage.networks.pytorch import to_torch as to_torch
from synflow_jax.storage.networks.pytorch_names import torch_names as torch_names
