"""Training: state, step, epoch, evaluation and whole runs, as pure functions."""

from synflow_jax.training.steps import CURVE as CURVE
from synflow_jax.training.steps import METRICS as METRICS
from synflow_jax.training.steps import EpochFn as EpochFn
from synflow_jax.training.steps import EvaluateFn as EvaluateFn
from synflow_jax.training.steps import StepFn as StepFn
from synflow_jax.training.steps import Sums as Sums
from synflow_jax.training.steps import TrainInfo as TrainInfo
from synflow_jax.training.steps import TrainState as TrainState
from synflow_jax.training.steps import batch_sharding as batch_sharding
from synflow_jax.training.steps import cross_entropy as cross_entropy
from synflow_jax.training.steps import finish_epoch as finish_epoch
from synflow_jax.training.steps import init_info as init_info
from synflow_jax.training.steps import init_state as init_state
from synflow_jax.training.steps import make_epoch as make_epoch
from synflow_jax.training.steps import make_evaluate as make_evaluate
from synflow_jax.training.steps import make_evaluate_batch as make_evaluate_batch
from synflow_jax.training.steps import make_step as make_step
from synflow_jax.training.steps import make_train as make_train
from synflow_jax.training.steps import means as means
from synflow_jax.training.steps import record_step as record_step
from synflow_jax.training.steps import sgd as sgd
from synflow_jax.training.steps import steps_per_epoch as steps_per_epoch
from synflow_jax.training.steps import stepwise as stepwise
from synflow_jax.training.steps import sums as sums
