"""The networks of the paper in Flax: by name, with their variables, and smaller after pruning."""

from synflow_jax.models.apply import eval_fn as eval_fn
from synflow_jax.models.apply import output_positions as output_positions
from synflow_jax.models.apply import synflow_fn as synflow_fn
from synflow_jax.models.apply import train_fn as train_fn
from synflow_jax.models.initialize import init as init
from synflow_jax.models.layers import HEAD as HEAD
from synflow_jax.models.network import Network as Network
from synflow_jax.models.registry import NAMES as NAMES
from synflow_jax.models.registry import create as create
from synflow_jax.models.registry import default_input_shape as default_input_shape
from synflow_jax.models.smaller import Compact as Compact
from synflow_jax.models.smaller import compact as compact
