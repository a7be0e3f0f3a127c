"""Masks, rows, certificates and JSON: what a run leaves behind, written atomically."""

from synflow_jax.storage.files import Stopped as Stopped
from synflow_jax.storage.files import check_writable as check_writable
from synflow_jax.storage.files import load_arrays as load_arrays
from synflow_jax.storage.files import load_certificate as load_certificate
from synflow_jax.storage.files import load_mask as load_mask
from synflow_jax.storage.files import mask_digest as mask_digest
from synflow_jax.storage.files import own as own
from synflow_jax.storage.files import read_all_rows as read_all_rows
from synflow_jax.storage.files import read_rows as read_rows
from synflow_jax.storage.files import save_arrays as save_arrays
from synflow_jax.storage.files import save_certificate as save_certificate
from synflow_jax.storage.files import save_mask as save_mask
from synflow_jax.storage.files import write_bytes as write_bytes
from synflow_jax.storage.files import write_json as write_json
from synflow_jax.storage.files import write_row as write_row
