"""Floor 9. Pictures, drawn from result rows alone; the only folder that knows matplotlib.

`python -m synflow_jax.figures NAME --rows=DIR` draws a figure of the paper; the scripts draw one run by `layers` and
`curve`. Matplotlib is imported where something is drawn, so that its memory is not there while programs are compiled.
"""

from synflow_jax.figures.runs import curve, layers, save

__all__ = ["curve", "layers", "save"]
