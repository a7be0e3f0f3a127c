"""Strictness for all tests, and the folder of golden figures."""

from __future__ import annotations

import gc
import os
import pathlib
from collections.abc import Iterator

# Most time of the tests is compilation, whose last stage need not try hardest: it saves a fifth of the processor time,
# and golden masks take as long as ever (at level 0 twice as long). For the commands that tests start, too.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip()
)

import jax
import pytest

# A shape that broadcasts by accident is an error in every test; so is a warning (pyproject.toml).
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same network is compiled in many tests: once is enough, also over several runs, workers and commands.
_CACHE = pathlib.Path(__file__).parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Tracing makes many small objects, and JAX has the collector sweep its own as well: a third of a tracing test's time.
gc.disable()


@pytest.fixture(autouse=True, scope="module")
def _collect() -> Iterator[None]:
    """Collects between files."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def cache() -> pathlib.Path:
    """The folder of compiled programs that commands are started with."""
    return _CACHE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=str(pathlib.Path(__file__).parent / "golden"),
        help="the folder of NAME_seedS.npz files that tests/test_golden.py checks",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folder = pathlib.Path(metafunc.config.getoption("--golden-dir"))
        files = sorted(folder.glob("*.npz"))
        if not files:
            raise pytest.UsageError(f"--golden-dir={folder} holds no .npz file")
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])
