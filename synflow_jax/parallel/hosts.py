"""Several processes as one program: who is there, and which part of the work is whose.

`jax.distributed` joins processes by itself, but where one of them never comes it ends all others with an abort of XLA's
that names nobody. So they meet here first, on the port that JAX takes afterwards: process 0 counts who comes and tells
everybody to go on, or who is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

_T = TypeVar("_T")
_HELLO = "synflow_jax hosts 1"
_PAUSE_S = 0.1  # between two attempts to reach process 0
_GRACE_S = 10  # how much longer than process 0 waits the others wait for its answer
# At its end a process waits for the others, whose share may take hours longer; JAX's own limit is 5 minutes, and then
# it aborts all of them.
_SHUTDOWN_S = 30 * 24 * 3600


@dataclasses.dataclass(frozen=True)  # a tuple has an index and a count of its own
class Hosts:
    """Which of how many processes this one is: index counts from 0."""

    index: int
    count: int


ALONE = Hosts(0, 1)


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    cluster: bool = False,
    timeout_s: float = 300,
) -> Hosts:
    """Joins the processes of a job, each of which calls this before JAX is used; alone where nothing is asked for.

    Afterwards `jax.devices()` are those of all processes and `jax.local_devices()` those of this one. A process that
    ends waits for the others to end, also after an error. One that is killed takes the others with it, after the 100
    seconds in which JAX misses its heartbeat.

    Args:
      coordinator: "HOST:PORT" of process 0, the same for all.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      cluster: what is not given is read from the environment, as JAX knows it: of a SLURM job, a TPU pod, Open MPI.
      timeout_s: how long to wait for all of them.

    Raises:
      ValueError: an argument is missing or out of its range; there is no cluster; two processes say that they are the
        same one, or that there are different numbers of them.
      TimeoutError: a process did not come; names it, in every process that did.
      OSError: the port is taken, or process 0 went away.

    >>> join()
    Hosts(index=0, count=1)
    """
    if not 0 < timeout_s < float("inf"):
        raise ValueError(
            f"timeout_s={timeout_s} must be positive and finite: seconds to wait for all processes."
        )
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if not cluster:
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == 3:
            return ALONE
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} missing: the processes of a job are joined by coordinator=HOST:PORT, "
                "num_processes and process_id together, or by cluster=True where SLURM or a TPU pod knows them."
            )
    else:
        coordinator, num_processes, process_id = _detect(
            coordinator, num_processes, process_id, timeout_s
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id={process_id} and num_processes={num_processes}: there must be at least one process, and they "
            "are numbered from 0 to num_processes - 1."
        )
    host, port = _address(coordinator)
    if num_processes == 1:
        return ALONE
    hosts = Hosts(process_id, num_processes)
    if process_id == 0:
        _gather(coordinator, port, num_processes, timeout_s)
    else:
        _report(host, port, hosts, timeout_s)
    # JAX's service would take SIGTERM for itself, which the commands hear to save where they stand.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=max(60, round(timeout_s)),
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )
    return hosts


def share(items: Sequence[_T], hosts: Hosts) -> list[_T]:
    """The part of the items that is this process's: neighbours stay together, sizes differ by one at most.

    >>> [share("abcde", Hosts(i, 3)) for i in range(3)]
    [['a'], ['b', 'c'], ['d', 'e']]
    """
    start, stop = (len(items) * i // hosts.count for i in (hosts.index, hosts.index + 1))
    return list(items[start:stop])


def _detect(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout_s: float
) -> tuple[str, int, int]:
    """What is not given, as `jax.distributed.initialize` would find it by itself; it has no public name."""
    try:
        from jax._src.clusters import ClusterEnv

        coordinator, num_processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, None, round(timeout_s)
        )
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cluster=True does not work with JAX {jax.__version__} ({error}): give coordinator, num_processes and "
            "process_id."
        ) from error
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "cluster=True, but there is none: neither the variables of a SLURM job (SLURM_JOB_ID, SLURM_PROCID, ...; "
            "start the processes by srun) nor a TPU pod. Give coordinator, num_processes and process_id."
        )
    return coordinator, num_processes, process_id


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"coordinator={coordinator!r} must be HOST:PORT of process 0, for instance 10.0.0.1:8476."
        )
    return host.strip("[]"), int(port)


def _gather(coordinator: str, port: int, count: int, timeout_s: float) -> None:
    """Process 0: waits for all others and tells them that all are there, or what is wrong, which it raises itself."""
    deadline = time.monotonic() + timeout_s
    names = {0: socket.gethostname()}
    connections: list[socket.socket] = []
    problem: Exception | None = None
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=dual)
    except OSError as error:
        raise OSError(
            f"coordinator={coordinator!r}: port {port} cannot be used: {error}. Choose another."
        ) from error
    with server:
        while len(names) < count and problem is None:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                problem = TimeoutError(_missing(names, coordinator, count, timeout_s))
                break
            hello = _receive(connection, 5)
            if (
                hello.get("format") != _HELLO
            ):  # somebody else, or a process that was stopped meanwhile
                connection.close()
                continue
            connections.append(connection)
            index, name = hello["process_id"], hello["host"]
            if hello["num_processes"] != count:
                problem = ValueError(
                    f"process {index} on {name} was started with num_processes={hello['num_processes']}, process 0 on "
                    f"{names[0]} with {count}. Start all of them with the same number."
                )
            elif index in names:
                problem = ValueError(
                    f"process_id={index} was given twice: on {names[index]} and on {name}. Give each process its own, "
                    f"from 0 to {count - 1}."
                )
            names[index] = name
    # The port is free again before anybody is told to go on: JAX takes it now.
    for connection in connections:
        kind = "timeout" if isinstance(problem, TimeoutError) else "value"
        _send(connection, {"problem": None if problem is None else str(problem), "kind": kind})
        connection.close()
    if problem is not None:
        raise problem


def _missing(names: dict[int, str], coordinator: str, count: int, timeout_s: float) -> str:
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    known = dict(enumerate(workers)) if len(workers) == count else {}
    missing = [
        f"process {i}" + (f" ({known[i]})" if i in known else "")
        for i in range(count)
        if i not in names
    ]
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    return (
        f"{_listed(missing)} of {count} did not join within {timeout_s:g} s. "
        f"Those that did: {_listed([f'process {i} on {name}' for i, name in sorted(names.items())])}. "
        + (f"The job's nodes are {nodes}. " if nodes else "")
        + f"Was it started, with the same coordinator and number of processes, and does it reach {coordinator}? "
        "A longer timeout (--join_timeout) waits longer."
    )


def _listed(words: list[str], most: int = 16) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _report(host: str, port: int, hosts: Hosts, timeout_s: float) -> None:
    """Every other process: says to process 0 that it is there, and waits to hear that all are."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        try:
            connection = socket.create_connection((host, port), timeout=max(0.001, left))
            break
        except OSError as error:
            if left <= 0:
                raise TimeoutError(
                    f"process 0 of {hosts.count} did not answer at coordinator={host}:{port} within {timeout_s:g} s "
                    f"({error}). Was it started, is the address its own, and is the port open between the hosts? A "
                    "longer timeout (--join_timeout) waits longer."
                ) from error
            time.sleep(min(_PAUSE_S, max(0.001, left)))
    with connection:
        name = socket.gethostname()
        hello = {
            "format": _HELLO,
            "process_id": hosts.index,
            "num_processes": hosts.count,
            "host": name,
        }
        _send(connection, hello)
        answer = _receive(connection, timeout_s + _GRACE_S)
    if "problem" not in answer:
        raise ConnectionError(
            f"process 0 at coordinator={host}:{port} went away, or another program listens there. Look at what process "
            "0 says, or choose another port."
        )
    if answer["problem"] is not None:
        raise (TimeoutError if answer["kind"] == "timeout" else ValueError)(answer["problem"])


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(
        OSError
    ):  # the other side is gone, and is found missing where it matters
        connection.sendall((json.dumps(message) + "\n").encode())


def _receive(connection: socket.socket, timeout_s: float) -> dict[str, Any]:
    """One message; {} for anything that is none."""
    connection.settimeout(timeout_s)
    try:
        with connection.makefile("rb") as lines:
            message = json.loads(lines.readline(2**16))
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
