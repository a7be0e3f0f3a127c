"""The house: imports go down the floors only, every public name is documented, the configs all load."""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib
import sys

import pytest

import synflow_jax
from synflow_jax import config, data

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "synflow_jax"

FLOORS = {
    "trees": 0,
    "jaxprs": 0,
    "masking": 1,
    "schedules": 1,
    "scaling": 1,
    "tracing": 1,
    "scores": 2,
    "layerwise": 2,
    "units": 2,
    "pruning": 3,
    "compaction": 3,
    "analysis": 4,
    "sharded": 4,
    "models": 4,
    "data": 4,
    "storage": 4,
    "hosts": 4,
    "checkpoints": 4,
    "training": 5,
    "forms": 5,
    "exchange": 5,
    "config": 6,
    "imp": 6,
    "cli": 7,
    "prune_run": 7,
    "certificates": 8,
    "prune_grid": 8,
    "train_run": 8,
    "export_run": 9,
    "imp_run": 9,
    "figures": 9,
    "sweep": 10,
    "report": 10,
}
# Packages beside the standard library, and the one floor or file that may import them.
ALLOWED = {
    "numpy": set(FLOORS),
    "jax": set(FLOORS),
    "chex": set(FLOORS),
    "flax": {"models", "forms", "training", "exchange", "prune_run"},
    "optax": {"training", "train_run"},
    "orbax": {"checkpoints"},
    "tensorstore": {"checkpoints"},
    "sklearn": {"data"},
    "PIL": {"data"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "safetensors": {"storage", "exchange"},
    "matplotlib": {"figures"},
    "rich": {"report", "figures"},
    "absl": {"cli", "figures"},
    "ml_collections": {"cli"},
}


def _modules() -> list[tuple[str, pathlib.Path]]:
    """(top-level module name, file) of every file of the package but its __init__."""
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(files)]


def _imports(path: pathlib.Path) -> list[str]:
    """Dotted names of what a file imports; "from synflow_jax import x" as synflow_jax.x."""
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


@pytest.mark.parametrize("module, path", _modules(), ids=lambda value: getattr(value, "stem", value))
def test_imports_go_down(module: str, path: pathlib.Path) -> None:
    for name in _imports(path):
        package, _, rest = name.partition(".")
        if package == "synflow_jax":
            imported = rest.split(".")[0]
            own_folder = imported == module and path.parent != PACKAGE
            assert own_folder or FLOORS[imported] < FLOORS[module], (
                f"{path.name} imports {name}, which is no lower floor"
            )
        elif package not in sys.stdlib_module_names:
            assert module in ALLOWED.get(package, set()), f"{path.name} imports {name}"


def test_floors_name_every_module() -> None:
    assert {module for module, _ in _modules()} == set(FLOORS)


def test_docstrings_state_the_floor() -> None:
    for module, path in _modules():
        if path.parent == PACKAGE or path.name == "__init__.py":
            assert str(ast.get_docstring(ast.parse(path.read_text()))).startswith(f"Floor {FLOORS[module]}. "), path


def test_core_needs_no_flax() -> None:
    for name in _imports(PACKAGE / "__init__.py"):
        assert FLOORS[name.split(".")[1]] <= FLOORS["analysis"] and name.split(".")[1] not in ALLOWED["flax"]


@pytest.mark.parametrize("name", synflow_jax.__all__)
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(synflow_jax, name)
    documentation = inspect.getdoc(thing)
    assert documentation, f"{name} has no docstring"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter.name}) has no type"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configs_load_and_state_their_command(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(data, "check_readable", lambda *_: None)  # the files of most sets are not here
    config.check(module.get_config())
    commands = (f"python {script} --config=configs/{path.name}" for script in ("prune.py", "train.py"))
    assert any(command in module.__doc__ for command in commands)
    assert "@" not in module.__doc__
