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

# A process of a job that saves checkpoints of its share of the runs, as a sweep does.
_SAVING = """
import contextlib, pathlib, sys
import jax, numpy as np
from synflow_jax.parallel import hosts
from synflow_jax.storage import checkpoints

index, folder = int(sys.argv[2]), pathlib.Path(sys.argv[3])
hosts.join(sys.argv[1], 2, index)
with contextlib.ExitStack() as stack:
    runs = [checkpoints.open_folder(folder / f"{index}-{i}", {"run": i}, keep=2) for i in range(4)]
    runs = [stack.enter_context(run) for run in runs]
    for step in range(20):
        for run in runs:
            checkpoints.save(run, step, {"x": np.full(3, 100 * index + step)})
for i in range(4):
    print(*checkpoints.read_latest(folder / f"{index}-{i}")[0]["x"])
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


def _joining(port: int, index: int, count: int, timeout: float = 60) -> subprocess.Popen[str]:
    return _start(
        f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}",
        f"--join_timeout={timeout}", "--cpu_devices=2",
    )  # fmt: skip


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_two_processes_join_with_all_their_devices() -> None:
    port = _free_port()
    started = [_joining(port, i, 2) for i in range(2)]
    for i, (status, out, err) in enumerate(map(_end, started)):
        assert status == 0, err
        assert out.strip() == f"Hosts(index={i}, count=2) 2 4"


def test_processes_save_checkpoints_without_meddling(tmp_path: pathlib.Path) -> None:
    """Checks that no process waits for another or fails, though orbax shares keys within a job."""
    address = f"127.0.0.1:{_free_port()}"
    started = [_start(address, str(i), str(tmp_path), command=_SAVING) for i in range(2)]
    for i, (status, out, err) in enumerate(map(_end, started)):
        assert status == 0, err
        assert out.splitlines() == [" ".join([str(100 * i + 19)] * 3)] * 4
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
    for error in _meet((0, 3), (2, 3), timeout_s=1):
        assert isinstance(error, TimeoutError)
        assert re.match(
            "process 1 of 3 did not join within 1 s. Those that did: process 0 on .*, process 2 on",
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
        (("a:1", 2, 0), {"timeout_s": 0}, "timeout_s=0 must be positive"),
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
