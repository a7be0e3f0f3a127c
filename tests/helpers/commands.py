"""Runs a script many times and imports it once.

One process imports the script. Each run is a fork of that process, so that a test of 25 commands
pays for one import of JAX.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence

_ROOT = pathlib.Path(__file__).parents[2]


def run_all(
    script: str, cases: Mapping[str, Sequence[str]], environment: Mapping[str, str]
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Runs `python SCRIPT.py FLAGS` for each case. Returns the status and the output of each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, script, folder]
        driver = subprocess.run(
            command,
            input=json.dumps(list(cases.values())),
            cwd=_ROOT,
            env={**environment, "PYTHONPATH": str(_ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert driver.returncode == 0, driver.stderr
        read = lambda i, name: pathlib.Path(folder, f"{i}.{name}").read_text()
        return {
            case: subprocess.CompletedProcess(
                flags, int(read(i, "status")), read(i, "stdout"), read(i, "stderr")
            )
            for i, (case, flags) in enumerate(cases.items())
        }


def _main(script: str, folder: str) -> None:
    from synflow_jax.experiments import cli  # the parent does not need it

    module = importlib.import_module(script)
    warnings.simplefilter("ignore")  # JAX warns of forks: it has no threads yet
    for i, flags in enumerate(json.load(sys.stdin)):
        child = os.fork()
        if child == 0:
            for name, stream in (("stdout", 1), ("stderr", 2)):
                os.dup2(
                    os.open(os.path.join(folder, f"{i}.{name}"), os.O_CREAT | os.O_WRONLY), stream
                )
            sys.argv = [f"{script}.py", *flags]
            cli.run(module.main)  # ends the child, with the status of the command
        _, status = os.waitpid(child, 0)
        pathlib.Path(folder, f"{i}.status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
