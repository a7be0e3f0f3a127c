"""Programs that JAX traced: what their calls have in common, and evaluation that cannot overflow."""

from synflow_jax.jaxprs.calls import CALLS as CALLS
from synflow_jax.jaxprs.calls import scan_counts as scan_counts
