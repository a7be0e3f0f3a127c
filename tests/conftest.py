"""Makes the tests strict, shares compiled programs, and finds the golden files."""

from __future__ import annotations

import gc
import os
import pathlib
from collections.abc import Iterator

# Most of the time of the tests is compilation. Its last stage at level 1 saves a fifth of the
# processor time. At level 0 the programs are slower: golden masks take twice as long. The variable
# also reaches the commands that tests start.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip()
)

import jax
import pytest
from cases import slow_except

# A shape that broadcasts by accident is an error in every test; so is a warning (pyproject.toml).
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same network. The cache shares it between workers, commands and runs.
_CACHE = pathlib.Path(__file__).parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Tracing makes many small objects. Collecting them took a third of the time of a tracing test.
gc.disable()


@pytest.fixture(autouse=True, scope="module")
def _collect() -> Iterator[None]:
    """Collects garbage after each file."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def cache() -> pathlib.Path:
    """Returns the folder of compiled programs, for the commands that tests start."""
    return _CACHE


def _is_small(file: pathlib.Path) -> bool:
    """Returns whether a golden file is of a network that is pruned in seconds."""
    return file.stat().st_size < 120_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=str(pathlib.Path(__file__).parent / "golden"),
        help="the folder of NAME_seedS.npz files that tests/core/test_golden.py checks",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folder = pathlib.Path(metafunc.config.getoption("--golden-dir"))
        files = sorted(folder.glob("*.npz"))
        if not files:
            raise pytest.UsageError(f"--golden-dir={folder} holds no .npz file")
        small = [file for file in files if _is_small(file)]
        exhaustive = [file for file in files if file.stem.startswith("vgg11")]
        # Scores decide masks, so where masks are checked in CI scores need not be.
        if metafunc.function.__name__ == "test_scores_in_float64":
            exhaustive = [file for file in files if not _is_small(file)]
        cases = slow_except(small, files, exhaustive=exhaustive)
        metafunc.parametrize("golden_file", cases, ids=[file.stem for file in files])
