"""Checks the house: what each wing imports, and that public names are documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import synflow_jax
from synflow_jax import data
from synflow_jax.experiments import checks

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "synflow_jax"

# The wings, in the order of reading. A wing imports itself, the wings above it in this table that
# it names, and the outside packages that it names. NumPy, JAX and chex are free to all.
CORE = ("arguments", "trees", "schedules", "masking", "scores", "pruning", "certified")
WINGS: dict[str, tuple[set[str], set[str]]] = {
    "jaxprs": (set(), set()),
    "core": ({"jaxprs"}, set()),
    "units": ({"jaxprs", "core"}, set()),
    "analysis": ({"jaxprs", "core", "units"}, set()),
    "parallel": ({"jaxprs", "core"}, set()),
    "models": ({"core", "units"}, {"flax"}),
    "data": (set(), {"PIL", "grain", "sklearn", "tensorflow_datasets"}),
    "training": ({"core", "units", "analysis", "models", "data"}, {"flax", "optax"}),
    "storage": ({"core", "models"}, {"flax", "orbax", "safetensors", "tensorstore"}),
    "experiments": (
        {
            "jaxprs",
            "core",
            "units",
            "analysis",
            "parallel",
            "models",
            "data",
            "training",
            "storage",
        },
        {"absl", "flax", "matplotlib", "ml_collections", "optax", "rich"},
    ),
}
FREE = {"numpy", "jax", "chex"}


def wing_of(module: str) -> str:
    """The wing of a dotted module name below the package."""
    first = module.split(".")[0]
    return "core" if first in CORE else first


def files() -> list[pathlib.Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: pathlib.Path) -> list[str]:
    """Dotted names of what a file imports; `from synflow_jax import x` counts as synflow_jax.x."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "synflow_jax":
            found += [f"synflow_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.append(str(node.module))
    return found


def test_the_table_names_every_wing_and_has_no_circle() -> None:
    assert {
        wing_of(str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."))
        for path in files()
    } == set(WINGS)
    above: set[str] = set()
    for wing, (allowed, _) in WINGS.items():
        assert allowed <= above, f"{wing} may import {allowed - above}, which the table names later"
        above.add(wing)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_table(path: pathlib.Path) -> None:
    wing = wing_of(str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."))
    wings, outside = WINGS[wing]
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "synflow_jax":
            imported = wing_of(rest)
            assert imported in wings | {wing}, f"{path.name} ({wing}) imports {name}"
        elif package not in sys.stdlib_module_names:
            assert package in FREE | outside, f"{path.name} ({wing}) imports {name}"


def test_importing_the_package_loads_neither_flax_nor_units() -> None:
    names = "('flax', 'synflow_jax.units')"
    code = f"import sys, synflow_jax; print(*(n for n in {names} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", synflow_jax.__all__)
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(synflow_jax, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (
                f"{name}({parameter.name}) has no type"
            )


CONFIGS = [
    path
    for folder in (ROOT / "configs", ROOT / "paper" / "configs")
    for path in folder.glob("*.py")
    if path.name != "recipes.py"  # what several configs share
]


@pytest.mark.parametrize("path", sorted(CONFIGS), ids=lambda path: path.stem)
def test_configs_load_and_state_their_command(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(
        data, "check_readable", lambda *_: None
    )  # the files of most sets are not here
    checks.check(module.get_config())
    name = path.relative_to(ROOT)
    assert any(
        f"python {script} --config={name}" in module.__doc__ for script in ("prune.py", "train.py")
    )
