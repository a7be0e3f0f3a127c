"""Runs a script many times and imports it once.

One process imports the script. Each run is a fork of that process, so that a test of 25 commands
pays for one import of JAX.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

Result = subprocess.CompletedProcess[str]

_ROOT = pathlib.Path(__file__).parents[2]
_TIMEOUT_S = 300  # of one run


@contextlib.contextmanager
def serve(script: str, environment: Mapping[str, str]) -> Iterator[Callable[..., Result]]:
    """Yields a function that runs `python SCRIPT.py FLAGS`: run(*flags, VARIABLE="value", ...)."""
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory())
        folder = pathlib.Path(name)
        errors = stack.enter_context((folder / "server").open("w"))
        server = subprocess.Popen(
            [sys.executable, __file__, script, name],
            cwd=_ROOT,
            env={**environment, "PYTHONPATH": str(_ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert server.stdin is not None and server.stdout is not None
        requests, statuses = server.stdin, server.stdout

        def run(*flags: str, **variables: str) -> Result:
            requests.write(json.dumps([flags, variables]) + "\n")
            requests.flush()
            status = statuses.readline()
            assert status, (folder / "server").read_text()
            stdout, stderr = ((folder / name).read_text() for name in ("stdout", "stderr"))
            return subprocess.CompletedProcess(flags, int(status), stdout, stderr)

        try:
            yield run
        finally:
            requests.close()
            statuses.close()
            server.wait(60)


def run_all(
    script: str, cases: Mapping[str, Sequence[str]], environment: Mapping[str, str]
) -> dict[str, Result]:
    """Runs `python SCRIPT.py FLAGS` for each case. Returns the status and the output of each."""
    with serve(script, environment) as run:
        return {case: run(*flags) for case, flags in cases.items()}


def _main(script: str, folder: str) -> None:
    from synflow_jax.experiments import cli  # the parent does not need it

    module = importlib.import_module(script)
    warnings.simplefilter("ignore")  # JAX warns of forks: it has no threads yet
    for request in sys.stdin:
        flags, variables = json.loads(request)
        child = os.fork()
        if child == 0:
            for name, stream in (("stdout", 1), ("stderr", 2)):
                path = os.path.join(folder, name)
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.alarm(_TIMEOUT_S)
            os.environ.update(variables)
            sys.argv = [f"{script}.py", *flags]
            cli.run(module.main)  # ends the child, with the status of the command
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
