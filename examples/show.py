"""Prints what the `with_*.py` examples found. They share this file; it is not an example itself."""

from __future__ import annotations

from synflow_jax import analysis, masking, trees


def result(audit: analysis.Conservation, mask: trees.Mask, *, collapsed: bool) -> None:
    """Prints the audit of conservation, the number of weights kept, and whether a path is left."""
    kept = int(sum(masking.count_kept(mask)))
    total = sum(trees.sizes(mask))
    print(audit)
    print(f"{kept} of {total} weights kept, collapsed: {collapsed}")


def layers(mask: trees.Mask) -> dict[str, float]:
    """Prints the weights kept in each layer, and returns the fraction kept by name."""
    fractions = {}
    for name, size, kept in zip(
        trees.names(mask), trees.sizes(mask), masking.count_kept(mask), strict=True
    ):
        print(f"  {name:<26} {int(kept):>6} of {size:>6}")
        fractions[name] = int(kept) / size
    return fractions
