"""Trains networks under a mask, by pure functions: state, step, epoch, evaluation, whole runs.

Reading order: `state`, `optimizers`, `steps`, `epochs`; then `forms` (the smaller dense network in
place of the masked one) and `imp` (iterative magnitude pruning).
"""

from synflow_jax.training.epochs import EpochFn as EpochFn
from synflow_jax.training.epochs import EvaluateFn as EvaluateFn
from synflow_jax.training.epochs import batch_sharding as batch_sharding
from synflow_jax.training.epochs import make_epoch as make_epoch
from synflow_jax.training.epochs import make_evaluate as make_evaluate
from synflow_jax.training.epochs import make_evaluate_batch as make_evaluate_batch
from synflow_jax.training.epochs import make_train as make_train
from synflow_jax.training.epochs import prepare_batch as prepare_batch
from synflow_jax.training.epochs import steps_per_epoch as steps_per_epoch
from synflow_jax.training.optimizers import sgd as sgd
from synflow_jax.training.optimizers import stepwise as stepwise
from synflow_jax.training.state import CURVE as CURVE
from synflow_jax.training.state import METRICS as METRICS
from synflow_jax.training.state import Sums as Sums
from synflow_jax.training.state import TrainInfo as TrainInfo
from synflow_jax.training.state import TrainState as TrainState
from synflow_jax.training.state import finish_epoch as finish_epoch
from synflow_jax.training.state import init_info as init_info
from synflow_jax.training.state import init_state as init_state
from synflow_jax.training.state import means as means
from synflow_jax.training.state import sums as sums
from synflow_jax.training.steps import StepFn as StepFn
from synflow_jax.training.steps import cross_entropy as cross_entropy
from synflow_jax.training.steps import make_step as make_step
from synflow_jax.training.steps import record_step as record_step
