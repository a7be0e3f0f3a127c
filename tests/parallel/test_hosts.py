"""Tests jobs of several processes.

- Processes that name the same coordinator join, also by the variables of Slurm.
- If a process is missing, or two disagree, each process names the one that is at fault.
- The shares of the processes hold every item once, in order.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import Any

import pytest

from synflow_jax.parallel import hosts
from synflow_jax.parallel.hosts import Hosts
from synflow_jax.storage import checkpoints

# A command that joins as train.py and prune.py do, and prints its number.
_COMMAND = """
import jax
from synflow_jax.experiments import cli

def main(argv):
    print(cli.join_hosts(), jax.local_device_count(), jax.device_count())

if __name__ == "__main__":
    cli.run(main)
"""

# A command that also saves checkpoints of its share of the runs, as a sweep does.
_SAVING = """
import contextlib, os, pathlib
import jax, numpy as np
from synflow_jax.experiments import cli
from synflow_jax.storage import checkpoints

def main(argv):
    job, folder = cli.join_hosts(), pathlib.Path(os.environ["FOLDER"])
    print(job, jax.local_device_count(), jax.device_count())
    with contextlib.ExitStack() as stack:
        folders = [folder / f"{job.index}-{i}" for i in range(4)]
        runs = [checkpoints.open_folder(path, {"run": i}, keep=2) for i, path in enumerate(folders)]
        runs = [stack.enter_context(run) for run in runs]
        for step in range(20):
            for run in runs:
                checkpoints.save(run, step, {"x": np.full(3, 100 * job.index + step)})
    for path in folders:
        print(*checkpoints.read_latest(path)[0]["x"])

if __name__ == "__main__":
    cli.run(main)
"""


def _free_port(lowest: int = 1024) -> int:
    for port in range(lowest, 2**16) if lowest > 1024 else (0,):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError("no port is free")


def _start(
    *flags: str, env: dict[str, str] | None = None, command: str = _COMMAND
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", command, *flags],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _joining(
    port: int, index: int, count: int, timeout: float = 60, **more: Any
) -> subprocess.Popen[str]:
    return _start(
        f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}",
        f"--join_timeout={timeout}", "--cpu_devices=2", **more,
    )  # fmt: skip


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_two_processes_join_and_save_checkpoints_without_meddling(tmp_path: pathlib.Path) -> None:
    """Checks that each sees all devices, and that none waits for another or fails as it saves.

    Within a job, orbax would share keys between the processes.
    """
    port = _free_port()
    more: dict[str, Any] = {"env": {"FOLDER": str(tmp_path)}, "command": _SAVING}
    started = [_joining(port, i, 2, **more) for i in range(2)]
    for i, (status, out, err) in enumerate(map(_end, started)):
        assert status == 0, err
        joined, *saved = out.splitlines()
        assert joined == f"Hosts(index={i}, count=2) 2 4"
        assert saved == [" ".join([str(100 * i + 19)] * 3)] * 4
        # This process is not part of the job, and can read the checkpoint all the same.
        arrays, run = checkpoints.read_latest(tmp_path / f"{i}-0")
        assert arrays["x"].tolist() == [100 * i + 19] * 3 and run == {"run": 0}
    assert not list(tmp_path.rglob("*tmp*"))


def test_a_process_that_never_comes_ends_the_command_with_its_name() -> None:
    port = _free_port()
    status, out, err = _end(_joining(port, 0, 2, timeout=1))
    assert status == 2 and out == "" and "Traceback" not in err
    assert (
        "error: process 1 of 2 did not join within 1 s. "
        f"Those that did: process 0 on {socket.gethostname()}." in err
    )
    assert f"127.0.0.1:{port}" in err and "--join_timeout" in err


def _meet(*who: tuple[int, int], timeout_s: float = 10) -> list[Exception]:
    """Returns what `hosts.join` raises in each (index, count).

    Threads can stand for processes: a meeting that fails ends before JAX is told of them.
    """
    port = _free_port()

    def join(index: int, count: int) -> Exception:
        with pytest.raises((ValueError, TimeoutError)) as caught:
            hosts.join(f"127.0.0.1:{port}", count, index, timeout_s=timeout_s)
        return caught.value

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(join, *zip(*who, strict=True)))


def test_all_that_came_name_the_one_that_did_not() -> None:
    for error in _meet((0, 3), (2, 3), timeout_s=0.4):
        assert isinstance(error, TimeoutError)
        assert re.match(
            "process 1 of 3 did not join within 0.4 s. Those that did: process 0 on .*, process 2",
            str(error),
        )


def test_two_processes_of_one_number() -> None:
    for error in _meet((0, 3), (1, 3), (1, 3)):
        assert isinstance(error, ValueError) and "process_id=1 was given twice" in str(error)


def test_two_processes_of_different_counts() -> None:
    for error in _meet((0, 2), (1, 3)):
        assert isinstance(error, ValueError)
        assert re.match("process 1 on .* num_processes=3, process 0 on .* with 2", str(error))


def test_a_coordinator_that_never_comes() -> None:
    with pytest.raises(
        TimeoutError,
        match=r"process 0 of 2 did not answer at coordinator=127\.0\.0\.1:\d+ within 0\.3",
    ):
        hosts.join(f"127.0.0.1:{_free_port()}", 2, 1, timeout_s=0.3)


def test_a_slurm_job_is_joined_by_its_variables() -> None:
    port = _free_port(65535 - 2**12 + 1)  # JAX computes the port from the job id
    job = {
        "SLURM_JOB_ID": str(port - (65535 - 2**12 + 1)),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
    }
    started = [
        _start(
            "--cluster",
            "--join_timeout=60",
            env={**job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]
    for i, (status, out, err) in enumerate(map(_end, started)):
        assert status == 0, err
        assert out.startswith(f"Hosts(index={i}, count=2)")


@pytest.mark.parametrize(
    "args, options, message",
    [
        (("a:1", 2, None), {}, "process_id missing: .* cluster=True"),
        ((None, 2, 0), {}, "coordinator missing"),
        (("a:1", 2, 2), {}, "process_id=2 and num_processes=2"),
        (("a", 2, 0), {}, "coordinator='a' must be HOST:PORT"),
        (("a:99999", 2, 0), {}, "coordinator='a:99999' must be HOST:PORT"),
        (("a:" + "9" * 5000, 2, 0), {}, "must be HOST:PORT"),
        ((7, 2, 0), {}, "coordinator='?7'? must be HOST:PORT"),
        (("a:1", 2**40, 0), {}, "num_processes=1099511627776: .* at most 65536"),
        (("a:1", 2.0, True), {}, "process_id=True and num_processes=2.0"),
        (("a:1", 2, 0), {"timeout_s": 0}, "timeout_s=0 must be positive"),
        (("a:1", 2, 0), {"timeout_s": float("nan")}, "timeout_s=nan must be positive"),
        (("a:1", 2, 0), {"timeout_s": 1e300}, "timeout_s=1e.300 must be positive and at most"),
        (("a:1", 2, 0), {"timeout_s": "9"}, "timeout_s='9' must be positive"),
        ((None, None, None), {"cluster": True}, "there is none: .*SLURM"),
    ],
)
def test_arguments_that_cannot_be(
    args: tuple, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "TPU"))]:
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=message):
        hosts.join(*args, **options)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} cannot be used: .*Choose another"):
            hosts.join(f"127.0.0.1:{port}", 2, 0, timeout_s=1)


def test_shares_hold_every_item_once_in_order() -> None:
    for size in range(12):
        for count in range(1, 6):
            shares = [hosts.share(range(size), Hosts(i, count)) for i in range(count)]
            assert [item for share in shares for item in share] == list(range(size))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_where_nothing_is_asked_for() -> None:
    assert hosts.join() == hosts.join("127.0.0.1:1", 1, 0) == hosts.ALONE
