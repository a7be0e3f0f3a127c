"""What the scripts share: flags and errors as one message, the compilation cache."""

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
from synflow_jax.experiments import config
from synflow_jax.experiments.config import Config
from synflow_jax.parallel import hosts

_TRACEBACK = flags.DEFINE_bool(
    "traceback", False, "show the whole traceback of an error instead of one message"
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "as how many devices the processor appears, to try what runs on several",
    lower_bound=1,
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where several processes run one job"
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "how many processes run this job", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "which of them this one is, from 0", lower_bound=0
)
_CLUSTER = flags.DEFINE_bool(
    "cluster", False, "read the three above from SLURM or the TPU pod that this runs on"
)
_JOIN_TIMEOUT = flags.DEFINE_float(
    "join_timeout", 300, "seconds in which all processes must have come", lower_bound=0
)

_STOPPED = (
    143  # the status of a process that SIGTERM ended: the run is not complete, and must not look so
)

# What the library raises for input that it cannot use. Anything else is our mistake and keeps its traceback.
_EXPECTED = (ValueError, FloatingPointError, OSError)


def run(main: Callable[[Sequence[str]], None], *, words: bool = False) -> None:
    """`absl.app.run`, with every error of the user's input as one message on stderr and a status that is not 0.

    `words` says whether the command takes anything besides flags.
    """

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(
                logging.WARNING
            )  # JAX tells at INFO which accelerators are not there
        try:
            if len(argv) > 1 and not words:
                raise ValueError(
                    f"{argv[1]!r} is no flag. Flags begin with --, values follow an =."
                )
            if _CPU_DEVICES.value is not None:
                jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
            main(argv)
        except _EXPECTED as error:
            if _TRACEBACK.value:
                raise
            _fail(str(error))
        except storage.Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(_STOPPED)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)


def config_help(*omitted: str) -> str:
    """What --help says of --config: the keys that flags can set, but for those that begin with one of `omitted`."""
    keys = [
        key
        for key, type_ in _keys(Config).items()
        if type_ is not Any and not key.startswith(omitted)
    ]
    return f"a file of configs/; each of its keys is a flag as well, --config.KEY=VALUE. The keys are {', '.join(keys)}"


def check_workdir(value: str) -> pathlib.Path:
    """The folder that --workdir names. Raises ValueError for an empty name or if no file can be written there."""
    if not value:
        raise ValueError(
            "--workdir='' names no folder: give one, --workdir=DIR, or leave the flag out."
        )
    storage.check_writable(pathlib.Path(value))
    return pathlib.Path(value)


def check_config(value: Any, *, reads_data: bool = True) -> Config:
    """The value of --config, checked, with the data that it needs unless the command `reads_data`=False.

    Raises:
      ValueError: it is missing, of another type, or out of range.
    """
    if not isinstance(value, Config):
        problem = "is missing" if value is None else f"is a {type(value).__name__}"
        raise ValueError(
            f"--config {problem}; it must name a file whose get_config() returns a synflow_jax.config.Config, "
            f"for instance --config=configs/vgg16_c100.py. {_config_files()}"
        )
    config.check(value, reads_data=reads_data)
    for key in config_flags.get_override_values(flags.FLAGS["config"]):
        if key in config.grid_values(value):
            name = key.removeprefix("prune.")
            raise ValueError(
                f"--config.{key} has no effect: the config's grid sets it to {config.grid_values(value)[key]}. Set "
                f"--config.grid.{name} instead."
            )
    return value


def join_hosts() -> hosts.Hosts:
    """Joins the processes that the flags name, before JAX is used; `hosts.ALONE` where they name none.

    Raises: as `hosts.join`.
    """
    return hosts.join(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        cluster=_CLUSTER.value,
        timeout_s=_JOIN_TIMEOUT.value,
    )


def use_compilation_cache() -> None:
    """Keeps compiled programs on the disk (JAX_COMPILATION_CACHE_DIR), so that a second run starts at once."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "synflow_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM or SIGINT came; a second one acts as it always does."""
    came: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def hear(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(number)
        restore()
        print("stopping: saving where the run stands", file=sys.stderr, flush=True)

    for number in usual:
        signal.signal(number, hear)
    try:
        yield lambda: bool(came)
    finally:
        restore()


def _parse(argv: list[str]) -> list[str]:
    app.define_help_flags()
    files = [arg.partition("=")[2] for arg in argv if re.match(r"--?config=", arg)]
    try:
        for file in files:
            if not pathlib.Path(file.partition(":")[0]).is_file():
                raise ValueError(f"--config={file}: there is no such file. {_config_files()}")
        _check_keys(argv)
        flags.FLAGS.set_gnu_getopt()  # flags may follow words
        return flags.FLAGS(argv)
    except (flags.Error, ValueError) as error:
        if "Traceback (most recent call last)" not in str(error):
            _fail(str(error))
        if "--traceback" in argv:
            raise
        # ml_collections puts the traceback of a config file into the message; its last line is what was raised.
        _fail(
            f"--config={''.join(files)} does not load: {str(error).strip().splitlines()[-1]} --traceback shows where."
        )
    except Exception as error:  # a config file is a program: it may raise anything
        if "--traceback" in argv:
            raise
        _fail(f"--config={''.join(files)} does not load: {error!r}. --traceback shows where.")


def _check_keys(argv: list[str]) -> None:
    keys = _keys(Config)
    for arg in argv:
        match = re.match(r"--?config\.([^=]+)", arg)
        if match and keys.get(match[1]) is Any:
            raise ValueError(
                f"--config.{match[1]} is no value that a flag can give: set it in the config file."
            )
        if match and match[1] not in keys:
            same = [
                key for key in keys if key.endswith(f".{match[1]}") and not key.startswith("grid.")
            ]
            close = same or difflib.get_close_matches(match[1], keys, n=1, cutoff=0.5)
            hint = f"Did you mean --config.{close[0]}? " if close else ""
            raise ValueError(
                f"--config.{match[1]} is no key of the config. {hint}The keys are: {', '.join(keys)}."
            )


def _keys(dataclass: Any) -> dict[str, Any]:
    """The keys of a config, those within its parts with a dot, and their types."""
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(dataclass):
        default = field.default_factory() if callable(field.default_factory) else field.default
        inner = _keys(default) if dataclasses.is_dataclass(default) else {}
        keys |= {f"{field.name}.{key}": type_ for key, type_ in inner.items()} or {
            field.name: field.type
        }
    return keys


def _config_files() -> str:
    found = sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))
    return (
        f"There are {', '.join(found)}." if found else "The repository has examples under configs/."
    )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
