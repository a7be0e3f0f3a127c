"""Provides what the scripts share: common flags, errors as one message, the compilation cache."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from synflow_jax import storage
from synflow_jax.experiments import checks
from synflow_jax.experiments.config import Config
from synflow_jax.experiments.run import grid_values
from synflow_jax.parallel import hosts

_TRACEBACK = flags.DEFINE_bool(
    "traceback", False, "show the whole traceback of an error instead of one message"
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "split the processor into this many devices, to try out code for several",
    lower_bound=1,
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, if several processes run one job"
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "how many processes run this job", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "which of them this process is, from 0", lower_bound=0
)
_CLUSTER = flags.DEFINE_bool(
    "cluster", False, "read the three flags above from SLURM or from the TPU pod of this process"
)
_JOIN_TIMEOUT = flags.DEFINE_float(
    "join_timeout", 300, "how many seconds to wait until all processes have joined", lower_bound=0
)

# The exit status after SIGTERM. Not 0, because the run is not complete.
_STOPPED = 143
_INTERRUPTED = 130

# The library raises these for input that it cannot use. Any other error is a bug of ours, and keeps
# its traceback.
_EXPECTED = (ValueError, FloatingPointError, OSError)


# Running a script


def run(main: Callable[[Sequence[str]], None], *, words: bool = False) -> None:
    """Starts a script by `absl.app.run`, and prints errors of the user's input as one message.

    The message goes to stderr, and the exit status is not 0.

    Args:
      main: the script's main function.
      words: whether the command takes arguments other than flags.
    """

    def guarded(argv: Sequence[str]) -> None:
        with _errors_as_messages():
            if len(argv) > 1 and not words:
                raise ValueError(
                    f"{argv[1]!r} is no flag. Flags begin with --, values follow an =."
                )
            _configure()
            main(argv)

    app.run(guarded, flags_parser=_parse)


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Turns expected errors into a message and an exit status."""
    try:
        yield
    except _EXPECTED as error:
        if _TRACEBACK.value:
            raise
        _fail(str(error))
    except storage.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(_STOPPED)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _configure() -> None:
    """Applies the flags that concern absl and JAX, before JAX is used."""
    if not flags.FLAGS["verbosity"].present:
        # At INFO, JAX lists the accelerators that it has not found.
        logging.set_verbosity(logging.WARNING)
    if _CPU_DEVICES.value is not None:
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)


def _fail(message: str) -> NoReturn:
    """Prints an error and ends the process."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def use_compilation_cache() -> None:
    """Keeps compiled programs on the disk, so that a second run starts at once.

    The folder is JAX_COMPILATION_CACHE_DIR, or synflow_jax in the user's cache.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "synflow_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def join_hosts() -> hosts.Hosts:
    """Joins the processes that the flags name, before JAX is used.

    Returns:
      The job; `hosts.ALONE` if the flags name no other process.

    Raises: as `hosts.join`.
    """
    return hosts.join(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        cluster=_CLUSTER.value,
        timeout_s=_JOIN_TIMEOUT.value,
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM or SIGINT has arrived.

    A second signal has its usual effect.
    """
    arrived: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        arrived.append(number)
        restore()
        print("stopping: saving the state of the run", file=sys.stderr, flush=True)

    for number in usual:
        signal.signal(number, handle)
    try:
        yield lambda: bool(arrived)
    finally:
        restore()


# Checking flags


def check_workdir(value: str) -> storage.Workdir:
    """Returns the folder that --workdir names.

    Raises:
      ValueError: the name is empty, or no file can be written there.
    """
    if not value:
        raise ValueError(
            "--workdir='' names no folder: give one, --workdir=DIR, or leave the flag out."
        )
    storage.check_writable(pathlib.Path(value))
    return storage.Workdir(pathlib.Path(value))


def check_config(value: Any, *, reads_data: bool = True) -> Config:
    """Returns the value of --config, checked.

    Args:
      value: as the config file returns it.
      reads_data: also check that the data that pruning needs is on the disk.

    Raises:
      ValueError: it is missing, of another type, or has a value out of its range.
    """
    if not isinstance(value, Config):
        problem = "is missing" if value is None else f"is a {type(value).__name__}"
        raise ValueError(
            f"--config {problem}; it must name a file whose get_config() returns a "
            "synflow_jax.experiments.config.Config, for instance "
            f"--config=configs/vgg16_c100.py. {_config_files()}"
        )
    checks.check(value, reads_data=reads_data)
    _check_overrides(value)
    return value


def _check_overrides(config: Config) -> None:
    """Refuses a flag for a value that the grid sets: it would have no effect."""
    values = grid_values(config)
    for key in config_flags.get_override_values(flags.FLAGS["config"]):
        if key in values:
            raise ValueError(
                f"--config.{key} has no effect: the config's grid sets it to {values[key]}. Set "
                f"--config.grid.{key.removeprefix('prune.')} instead."
            )


# Parsing flags


def config_help(*omitted: str) -> str:
    """Returns the help of --config: the keys that flags can set.

    Args:
      *omitted: keys that begin with one of these are left out.
    """
    keys = [
        key
        for key, type_ in _keys(Config).items()
        if type_ is not Any and not key.startswith(omitted)
    ]
    return (
        "a file of configs/; each of its keys is a flag as well, --config.KEY=VALUE. The keys are "
        f"{', '.join(keys)}"
    )


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags, which loads the config file, and prints errors as one message."""
    app.define_help_flags()
    files = [arg.partition("=")[2] for arg in argv if re.match(r"--?config=", arg)]
    try:
        _check_files(files)
        _check_keys(argv)
        flags.FLAGS.set_gnu_getopt()  # flags may follow words
        return flags.FLAGS(argv)
    except (flags.Error, ValueError) as error:
        if "Traceback (most recent call last)" not in str(error):
            _fail(str(error))
        if "--traceback" in argv:
            raise
        # ml_collections puts the traceback of a config file into its message. The last line is the
        # error of the file.
        _fail_to_load(files, str(error).strip().splitlines()[-1])
    except Exception as error:  # a config file is a program: it may raise anything
        if "--traceback" in argv:
            raise
        _fail_to_load(files, f"{error!r}.")


def _fail_to_load(files: Sequence[str], problem: str) -> NoReturn:
    _fail(f"--config={''.join(files)} does not load: {problem} --traceback shows where.")


def _check_files(files: Sequence[str]) -> None:
    """Checks that the config file exists. Its name may be followed by a colon and an argument."""
    for file in files:
        if not pathlib.Path(file.partition(":")[0]).is_file():
            raise ValueError(f"--config={file}: there is no such file. {_config_files()}")


def _check_keys(argv: Sequence[str]) -> None:
    """Checks that each --config.KEY is a key that a flag can set."""
    keys = _keys(Config)
    for arg in argv:
        match = re.match(r"--?config\.([^=]+)", arg)
        if match is None:
            continue
        key = match[1]
        if key not in keys:
            raise ValueError(
                f"--config.{key} is no key of the config. {_hint(key, keys)}The keys are: "
                f"{', '.join(keys)}."
            )
        if keys[key] is Any:
            raise ValueError(
                f"--config.{key} is no value that a flag can give: set it in the config file."
            )


def _hint(unknown: str, keys: Sequence[str] | dict[str, Any]) -> str:
    """Returns a question with the key that was probably meant, or an empty string."""
    # First of all a key without its part: "compression" for "prune.compression".
    whole = [key for key in keys if key.endswith(f".{unknown}") and not key.startswith("grid.")]
    close = whole or difflib.get_close_matches(unknown, keys, n=1, cutoff=0.5)
    return f"Did you mean --config.{close[0]}? " if close else ""


def _keys(dataclass: Any) -> dict[str, Any]:
    """Returns the keys of a config and their types; those within its parts have a dot."""
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(dataclass):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if dataclasses.is_dataclass(default):
            inner = _keys(default)
            keys |= {f"{field.name}.{key}": type_ for key, type_ in inner.items()}
        else:
            keys[field.name] = field.type
    return keys


def _config_files() -> str:
    """Returns a sentence that says which config files there are."""
    paths = pathlib.Path("configs").glob("*.py")
    # The configs share recipes.py, which is none itself.
    found = sorted(str(path) for path in paths if path.name != "recipes.py")
    if found:
        return f"There are {', '.join(found)}."
    return "The repository has examples under configs/."
