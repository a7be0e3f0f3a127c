"""Prints what runs do, for people to read.

Every function takes the console first, and prints a row or an event:

- `lines` has single sentences: the network, its form, the result of a pruning;
- `tables` has the layers of a pruning row, and the sizes and epochs of a training row;
- `bars` has progress bars, as context managers that yield a callback;
- `single` and `sweep` show the events of training, one run or a grid, and yield a callback too;
- `listing` lists the files that a run has written;
- `style` has what they share: the console, the look of tables, percentages.
"""

from synflow_jax.experiments.report.bars import columns as columns
from synflow_jax.experiments.report.bars import grid as grid
from synflow_jax.experiments.report.bars import num_iterations as num_iterations
from synflow_jax.experiments.report.bars import progress as progress
from synflow_jax.experiments.report.bars import verification as verification
from synflow_jax.experiments.report.lines import already_done as already_done
from synflow_jax.experiments.report.lines import devices as devices
from synflow_jax.experiments.report.lines import form as form
from synflow_jax.experiments.report.lines import network as network
from synflow_jax.experiments.report.lines import pruned as pruned
from synflow_jax.experiments.report.lines import recipe as recipe
from synflow_jax.experiments.report.lines import verdict as verdict
from synflow_jax.experiments.report.listing import exported as exported
from synflow_jax.experiments.report.listing import files as files
from synflow_jax.experiments.report.listing import grid_files as grid_files
from synflow_jax.experiments.report.listing import sweep_files as sweep_files
from synflow_jax.experiments.report.listing import train_files as train_files
from synflow_jax.experiments.report.single import training_run as training_run
from synflow_jax.experiments.report.style import console as console
from synflow_jax.experiments.report.sweep import training_grid as training_grid
from synflow_jax.experiments.report.tables import row as row
from synflow_jax.experiments.report.tables import trained as trained
