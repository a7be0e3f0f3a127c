"""Parses the flags of a script, and says in one sentence what is wrong with a flag.

absl and ml_collections do the parsing. Their errors speak of Python's types and files. The errors
of this file name the key of the config, and suggest the key or the flag that was probably meant.
"""

from __future__ import annotations

import difflib
import logging
import pathlib
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from synflow_jax.experiments import expected, settings

# The types of the keys in words. The values of a grid have messages in `run.py`.
_KINDS = {int: "a whole number (int)", float: "a number (float)", bool: "True or False (bool)"}


def config_help(*omitted: str) -> str:
    """Returns the help of --config: the keys that flags can set.

    Args:
      *omitted: keys that begin with one of these are left out.
    """
    keys = [key for key in _settable(settings.keys()) if not key.startswith(omitted)]
    return (
        "a file of configs/; each of its keys is a flag as well, --config.KEY=VALUE. The keys are "
        f"{', '.join(keys)}"
    )


def config_files() -> str:
    """Returns a sentence that lists the config files."""
    paths = pathlib.Path("configs").glob("*.py")
    # The configs share recipes.py, which is none itself.
    found = sorted(str(path) for path in paths if path.name != "recipes.py")
    if found:
        return f"There are {', '.join(found)}."
    return "The repository has examples under configs/."


def parse(argv: list[str]) -> list[str]:
    """Parses the flags, which also loads the config file.

    Returns:
      The arguments that are not flags.

    Raises:
      ValueError: a flag is unknown or has a value that cannot be used, or the config file does not
        load.
    """
    app.define_help_flags()
    argv = [_with_home(arg) for arg in argv]
    files = _named_files(argv)
    # ml_collections would warn of a config file that returns None. `cli.check_config` refuses it.
    logging.disable(logging.WARNING)
    try:
        for file in files:
            _check_file(file)
        _check_keys(argv)
        flags.FLAGS.set_gnu_getopt()  # flags may follow words
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname)) from error
    except (flags.Error, ValueError) as error:
        message = str(error)
        if "Traceback (most recent call last)" in message:
            # ml_collections puts the traceback of a config file into its message. The last line is
            # the error of the file.
            message = _does_not_load(files, message.strip().splitlines()[-1])
        raise ValueError(_bad_value(message) or message) from error
    except Exception as error:  # a config file is a program: it may raise anything
        if isinstance(error, AttributeError) and error.name == "get_config":
            message = f"--config={''.join(files)} has no function get_config(). {config_files()}"
            raise ValueError(message) from error
        raise ValueError(_does_not_load(files, f"{error!r}.")) from error
    finally:
        logging.disable(logging.NOTSET)


def _does_not_load(files: Sequence[str], problem: str) -> str:
    return f"--config={''.join(files)} does not load: {problem} --traceback shows where."


# The config file


def _with_home(arg: str) -> str:
    """Returns an argument with the user's home in place of ~, if it names the config file."""
    name, equals, value = arg.partition("=")
    is_config = name in ("--config", "-config")
    return f"{name}={expected.expand_user(value)}" if is_config and equals else arg


def _named_files(argv: Sequence[str]) -> list[str]:
    """Returns the values of --config, written as --config=FILE or --config FILE."""
    files = []
    for i, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name not in ("--config", "-config"):
            continue
        if equals:
            files.append(value)
        else:
            files += argv[i + 1 : i + 2]
    return files


def _check_file(file: str) -> None:
    """Checks that a config file exists. Its name may be followed by a colon and an argument."""
    path = pathlib.Path(file.partition(":")[0])
    if not file:
        problem = " names no file."
    elif path.is_dir():
        problem = " is a folder, not a file."
    elif not path.is_file():
        problem = ": there is no such file."
    elif path.suffix != ".py":
        problem = " is not a Python file."
    else:
        return
    raise ValueError(f"--config={file}{problem} {config_files()}")


# The keys of the config


def _settable(keys: dict[str, Any]) -> list[str]:
    """Returns the keys that a flag can set: not functions or grids."""
    return [key for key, type_ in keys.items() if type_ is not Any]


def _check_keys(argv: Sequence[str]) -> None:
    """Checks that each --config.KEY is a key that a flag can set."""
    keys = settings.keys()
    for arg in argv:
        match = re.match(r"--?config\.([^=]+)", arg)
        if match is None:
            continue
        key = match[1]
        if key not in keys:
            raise ValueError(
                f"--config.{key} {settings.unknown_key(key, _settable(keys), '--config.')}"
            )
        if keys[key] is Any:
            raise ValueError(f"--config.{key} cannot be set by a flag: set it in the config file.")


# Flags


def _unknown_flag(name: str) -> str:
    """Returns a message about a flag that does not exist."""
    nearest = _nearest_flag(name)
    hint = f"Did you mean --{nearest}?" if nearest else "--help lists the flags."
    return f"--{name} is not a flag. {hint}"


def _nearest_flag(unknown: str) -> str | None:
    """Returns the flag that was probably meant: one of the script, or of a key of its config."""
    own = _own_flags()
    keys = _settable(settings.keys()) if "config" in own else []
    names = [key.rpartition(".")[2] for key in keys]
    # First a key without --config., whole or by its last word; then what is spelled alike.
    if unknown in keys or unknown in names:
        return f"config.{settings.nearest(unknown, keys)}"
    close = difflib.get_close_matches(unknown, [*own, *names], n=1, cutoff=0.6)
    if not close:
        return None
    return close[0] if close[0] in own else f"config.{settings.nearest(close[0], keys)}"


def _own_flags() -> list[str]:
    """Returns the flags that the script and `cli` define, without those of libraries."""
    script = sys.argv[0]
    modules = (script, pathlib.Path(script).stem, f"{__package__}.cli")
    defined = flags.FLAGS.flags_by_module_dict()
    return [flag.name for module in modules for flag in defined.get(module, ())]


def _bad_value(message: str) -> str | None:
    """Returns a message about a value of the wrong type, if that is what absl's message is of."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if match is None:
        return None
    key, value = match.groups()
    type_ = settings.keys().get(key)
    # Of an optional value, such as int | None, the type that is not None.
    kinds = [kind for kind in (type_, *typing.get_args(type_)) if kind in _KINDS]
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    return f"--config.{key}={shown} must be {_KINDS[kinds[0]]}." if kinds else None
