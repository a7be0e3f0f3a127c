"""Everything that a run leaves behind, written atomically and checked when it is read.

`Workdir` owns the folder of a run: its paths and its rows. Masks, certificates and arrays have one
file format each. `storage.checkpoints` (orbax) and `storage.networks` (flax) are imported by name,
since most commands do not need them.
"""

from synflow_jax.storage.arrays import load_arrays as load_arrays
from synflow_jax.storage.arrays import read_run as read_run
from synflow_jax.storage.arrays import save_arrays as save_arrays
from synflow_jax.storage.certificates import load_certificate as load_certificate
from synflow_jax.storage.certificates import save_certificate as save_certificate
from synflow_jax.storage.files import check_folder as check_folder
from synflow_jax.storage.files import check_writable as check_writable
from synflow_jax.storage.files import remove as remove
from synflow_jax.storage.files import write_bytes as write_bytes
from synflow_jax.storage.files import write_json as write_json
from synflow_jax.storage.locks import Busy as Busy
from synflow_jax.storage.masks import load_mask as load_mask
from synflow_jax.storage.masks import mask_digest as mask_digest
from synflow_jax.storage.masks import save_mask as save_mask
from synflow_jax.storage.rows import read_rows as read_rows
from synflow_jax.storage.rows import write_row as write_row
from synflow_jax.storage.workdir import Stopped as Stopped
from synflow_jax.storage.workdir import Workdir as Workdir
from synflow_jax.storage.workdir import check_run_id as check_run_id
