"""Says in words what rows are about, for the titles of figures."""

from __future__ import annotations

from paper.figures.rows import Row


def of_run(row: Row) -> str:
    """Returns the network, whose images it takes, and the seed."""
    return f"{of_network(row)}, {row['dataset']} input, seed {row['seed']}"


def of_network(row: Row) -> str:
    """Returns the network, and its width where that is not the published one."""
    width = row["config"]["width_multiplier"]
    return str(row["model"]) if width == 1 else f"{row['model']} at width {width:g}"


def of_rule(row: Row) -> str:
    """Returns the rule, and for data-driven rules the examples that it scored."""
    dataset = row["scored_dataset"]
    if dataset is None:
        return str(row["pruner"])
    examples = f"{dataset}, enlarged" if dataset == "digits" else dataset
    number = row["config"]["prune"]["examples_per_class"]
    return f"{row['pruner']} ({examples}, {number} a class)"


def of_compression(value: float) -> str:
    """Returns a compression with three digits below 10, and without a fraction above.

    >>> of_compression(3.1622776), of_compression(64190.2)
    ('3.16', '64,190')
    """
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def plural(number: int, noun: str) -> str:
    """Returns a number with its noun.

    >>> plural(1, "level"), plural(4, "level")
    ('1 level', '4 levels')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
