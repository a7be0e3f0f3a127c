"""Provides what the scripts share: common flags, errors as one message, the compilation cache."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from synflow_jax import storage
from synflow_jax.experiments import checks, expected, identity, parsing, settings
from synflow_jax.experiments.config import Config
from synflow_jax.experiments.parsing import config_help as config_help
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
    # JAX starts threads for each of them.
    upper_bound=256,
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
# How XLA says that memory is short.
_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
# Modes of JAX that find faults in a program. They end every training: optax mixes types, and JAX
# moves the seed of a key to the device.
_MODES = {
    "jax_transfer_guard": "allow",
    "jax_numpy_dtype_promotion": "standard",
}


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
                raise ValueError(f"{argv[1]!r} is not a flag. Write --name=value.")
            _configure()
            main(argv)

    app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags, and prints errors as one message."""
    try:
        return parsing.parse(argv)
    except ValueError as error:
        if "--traceback" in argv:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        _interrupt()


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Turns expected errors into a message and an exit status."""
    try:
        yield
    except _EXPECTED as error:
        if _TRACEBACK.value:
            raise
        _fail(str(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        is_memory = isinstance(error, MemoryError) or _MEMORY.search(str(error))
        if _TRACEBACK.value or not is_memory:
            raise
        first_line = str(error).partition("\n")[0]
        _fail(
            f"the memory is too small ({first_line}): choose a smaller network or batch, or fewer "
            "runs at a time (--config.sweep.runs_per_device)."
        )
    # JAX starts at its first use, and a missing platform raises errors of either type.
    except (RuntimeError, AssertionError):
        problem = None if _TRACEBACK.value else _platform_problem()
        if problem is None:
            raise
        _fail(problem)
    except storage.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(_STOPPED)
    except KeyboardInterrupt:
        _interrupt()


def _configure() -> None:
    """Applies the flags that concern absl and JAX, before JAX is used."""
    if not flags.FLAGS["verbosity"].present:
        # At INFO, JAX lists the accelerators that it has not found.
        logging.set_verbosity(logging.WARNING)
    if _CPU_DEVICES.value is not None:
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    ignored = identity.fix_generator()
    if ignored:
        named = ", ".join(ignored)
        print(
            f"note: {named} has no effect here. Runs draw with JAX's default generator, so that "
            "a run_id stands for the same network everywhere.",
            file=sys.stderr,
        )
    _end_modes()


def _end_modes() -> None:
    """Turns off the modes of JAX under which no training runs, and says so."""
    for name, value in _MODES.items():
        found = getattr(jax.config, name)
        if found not in (None, value):
            jax.config.update(name, value)
            print(f"note: {name}={found} has no effect here.", file=sys.stderr)


def _platform_problem() -> str | None:
    """Says why JAX cannot start, or returns None if it can."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        reason = str(error).partition(" (set ")[0] or "JAX does not find it"
        return (
            f"JAX_PLATFORMS={platforms!r} cannot be used here: {reason}. Unset it, set it to cpu, "
            "or install JAX for that platform."
        )
    return None


def _fail(message: str) -> NoReturn:
    """Prints an error and ends the process."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _interrupt() -> NoReturn:
    """Ends the process after Ctrl-C."""
    print("stopped", file=sys.stderr)
    sys.exit(_INTERRUPTED)


def use_compilation_cache() -> None:
    """Keeps compiled programs on the disk, so that a second run starts at once.

    The folder is JAX_COMPILATION_CACHE_DIR, or synflow_jax in the user's cache.
    """
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        folder = str(cache / "synflow_jax")
    # JAX would make a folder named ~.
    jax.config.update("jax_compilation_cache_dir", expected.expand_user(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # The disk is full. Nothing is lost, and the files of the run say so if they cannot be written.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")


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


def check_path(value: str, flag: str) -> pathlib.Path:
    """Returns the path of a flag, with the user's home in place of ~.

    Raises:
      ValueError: it is empty, or no path can have this name.
    """
    try:
        path = pathlib.Path(expected.path("a path").read(value))
        path.exists()
    except expected.Refused:
        cause = "there is no such user" if value.startswith("~") else "give its name"
        raise ValueError(f"--{flag}={value!r} names no file or folder: {cause}.") from None
    except OSError as error:
        raise ValueError(
            f"--{flag}={expected.shown(value)} cannot be used: {error.strerror}."
        ) from error
    return path


def check_workdir(value: str) -> storage.Workdir:
    """Returns the folder that --workdir names.

    Raises:
      ValueError: the name is empty, or no file can be written there.
    """
    if not value:
        raise ValueError(
            "--workdir='' names no folder: give one, --workdir=DIR, or leave the flag out."
        )
    path = check_path(value, "workdir")
    storage.check_writable(path)
    return storage.Workdir(path)


def check_config(value: Any, *, reads_data: bool = True) -> Config:
    """Returns the value of --config, checked.

    Args:
      value: as the config file returns it.
      reads_data: also check that the data that pruning needs is on the disk.

    Raises:
      ValueError: it is missing, of another type, or has a value out of its range.
    """
    if not isinstance(value, Config):
        is_given = flags.FLAGS["config"].present
        problem = "is missing" if not is_given else f"is a {type(value).__name__}"
        raise ValueError(
            f"--config {problem}; it must name a file whose get_config() returns a "
            "synflow_jax.experiments.config.Config, for instance "
            f"--config=configs/vgg16_c100.py. {parsing.config_files()}"
        )
    checked = settings.checked(value)
    checks.check(checked, reads_data=reads_data)
    _check_overrides(checked)
    return checked


def _check_overrides(config: Config) -> None:
    """Refuses a flag for a value that the grid sets: it would have no effect."""
    values = grid_values(config)
    for key in config_flags.get_override_values(flags.FLAGS["config"]):
        if key in values:
            raise ValueError(
                f"--config.{key} has no effect: the config's grid sets it to {values[key]}. Set "
                f"--config.grid.{key.removeprefix('prune.')} instead."
            )
