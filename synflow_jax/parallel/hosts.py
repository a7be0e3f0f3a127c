"""Joins several processes into one job, and divides work between them.

`jax.distributed` joins processes too. But if one of them never comes, XLA aborts all others without
saying which one is missing. So the processes meet here first, on the port that JAX takes
afterwards. Process 0 waits for all others. Then it tells them that all have come, or what is wrong.

In a meeting each process exchanges two JSON lines with process 0:

    process i -> 0    {"format": ..., "process_id": i, "num_processes": n, "host": NAME}
    0 -> process i    {"problem": null}, or {"problem": MESSAGE, "kind": "timeout" or "value"}
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
_HELLO_S = 5  # how long a process may take to say hello after it has connected
_GRACE_S = 10  # how much longer than process 0 the others wait for its answer
# A process that is done waits for the others, whose share may take hours longer. By default JAX
# aborts all of them after 5 minutes.
_SHUTDOWN_S = 30 * 24 * 3600
_WAIT_LONGER = "A longer timeout (--join_timeout) waits longer."


# Not a NamedTuple: every tuple already has methods `index` and `count`.
@dataclasses.dataclass(frozen=True)
class Hosts:
    """The place of this process in its job.

    Attributes:
      index: the number of this process, from 0.
      count: the number of processes.
    """

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
    """Joins the processes of a job. Each of them calls this before it uses JAX.

    Without arguments this process is alone. Afterwards `jax.devices()` are those of all processes,
    and `jax.local_devices()` those of this one. A process that ends, even by an error, waits for
    the others to end. If one is killed, JAX ends the others 100 seconds later, when it has missed
    its heartbeat.

    Args:
      coordinator: "HOST:PORT" of process 0, the same for all processes.
      num_processes: the number of processes.
      process_id: which process this is, from 0.
      cluster: whether JAX finds the arguments that are not given, from the environment of a SLURM
        job, a TPU pod or Open MPI.
      timeout_s: how long to wait for all processes.

    Raises:
      ValueError: an argument is missing or out of its range, there is no cluster, or the processes
        do not agree on their number or use one number twice.
      TimeoutError: a process did not come; every process that came names it.
      OSError: the port is taken, or process 0 went away.

    >>> join()
    Hosts(index=0, count=1)
    """
    if not 0 < timeout_s < float("inf"):
        raise ValueError(
            f"timeout_s={timeout_s} must be positive and finite: seconds to wait for all processes."
        )
    # The arguments, from the caller or from the cluster: all three or none.
    if cluster:
        coordinator, num_processes, process_id = _detect(
            coordinator, num_processes, process_id, timeout_s
        )
    if coordinator is None and num_processes is None and process_id is None:
        return ALONE
    if coordinator is None or num_processes is None or process_id is None:
        raise _incomplete(
            coordinator=coordinator, num_processes=num_processes, process_id=process_id
        )
    hosts = _checked(process_id, num_processes)
    host, port = _address(coordinator)
    # A job of one process needs no port.
    if hosts.count == 1:
        return ALONE
    # The meeting, and only then JAX: from there on a missing process aborts all others.
    if hosts.index == 0:
        _gather(coordinator, port, hosts.count, timeout_s)
    else:
        _report(host, port, hosts, timeout_s)
    _initialize(coordinator, hosts, timeout_s)
    return hosts


def share(items: Sequence[_T], hosts: Hosts) -> list[_T]:
    """Returns this process's share of the items.

    A share is a run of neighbours. The sizes of the shares differ by at most one.

    >>> [share("abcde", Hosts(i, 3)) for i in range(3)]
    [['a'], ['b', 'c'], ['d', 'e']]
    """
    start = len(items) * hosts.index // hosts.count
    stop = len(items) * (hosts.index + 1) // hosts.count
    return list(items[start:stop])


# The arguments of `join`.


def _detect(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout_s: float
) -> tuple[str, int, int]:
    """Completes the arguments as `jax.distributed.initialize` does."""
    # JAX has no public name for this, and the private one may change in any version.
    try:
        from jax._src.clusters import ClusterEnv

        coordinator, num_processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, None, round(timeout_s)
        )
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cluster=True does not work with JAX {jax.__version__} ({error}): give coordinator, "
            "num_processes and process_id."
        ) from error
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "cluster=True, but there is none: neither the variables of a SLURM job (SLURM_JOB_ID, "
            "SLURM_PROCID, ...; start the processes with srun) nor a TPU pod. Give coordinator, "
            "num_processes and process_id."
        )
    return coordinator, num_processes, process_id


def _incomplete(**given: str | int | None) -> ValueError:
    """Returns the error for arguments of which some are given and some are not."""
    missing = [name for name, value in given.items() if value is None]
    listed = " and ".join(missing)
    return ValueError(
        f"{listed} missing: the processes of a job are joined by "
        "coordinator=HOST:PORT, num_processes and process_id together, or by cluster=True where "
        "SLURM or a TPU pod knows them."
    )


def _checked(process_id: int, num_processes: int) -> Hosts:
    """Returns which process this is, or raises ValueError if there is no such process."""
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id={process_id} and num_processes={num_processes}: there must be at least "
            "one process, and they are numbered from 0 to num_processes - 1."
        )
    return Hosts(process_id, num_processes)


def _address(coordinator: str) -> tuple[str, int]:
    """Splits HOST:PORT."""
    # From the right: an IPv6 address has colons too.
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"coordinator={coordinator!r} must be HOST:PORT of process 0, for instance "
            "10.0.0.1:8476."
        )
    return host.strip("[]"), int(port)


def _initialize(coordinator: str, hosts: Hosts, timeout_s: float) -> None:
    """Initializes `jax.distributed` for processes that have met."""
    # JAX's service would catch SIGTERM. The commands need that signal: on it they save their state.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        hosts.count,
        hosts.index,
        initialization_timeout=max(60, round(timeout_s)),
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )


# Process 0.


@dataclasses.dataclass
class _Meeting:
    """The processes that process 0 has heard from. `_welcome` adds to it.

    Attributes:
      count: the number of processes.
      names: the host of each process that has come, by number.
      connections: one per process that waits for an answer.
    """

    count: int
    names: dict[int, str]
    connections: list[socket.socket]


def _gather(coordinator: str, port: int, count: int, timeout_s: float) -> None:
    """Waits for all other processes. Then tells them that all have come, or what is wrong.

    Raises:
      ValueError, TimeoutError: a process does not fit or did not come. All others raise the same.
      OSError: the port is taken.
    """
    deadline = time.monotonic() + timeout_s
    meeting = _Meeting(count, names={0: socket.gethostname()}, connections=[])
    problem: Exception | None = None
    with _listen(coordinator, port, count) as server:
        while len(meeting.names) < count and problem is None:
            server.settimeout(_until(deadline))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                problem = _missing(meeting, coordinator, timeout_s)
            else:
                problem = _welcome(meeting, connection)
    # JAX takes the port next, so it must be free before any process is told that all have come.
    _answer(meeting, problem)
    if problem is not None:
        raise problem


def _listen(coordinator: str, port: int, count: int) -> socket.socket:
    """Opens the port of the meeting, for IPv4 and, where the machine has it, IPv6."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=dual)
    except OSError as error:
        raise OSError(
            f"coordinator={coordinator!r}: port {port} cannot be used: {error}. Choose another."
        ) from error


def _welcome(meeting: _Meeting, connection: socket.socket) -> ValueError | None:
    """Records a process that has connected. Returns the error if it does not fit the job."""
    hello = _receive(connection, _HELLO_S)
    if hello.get("format") != _HELLO:
        # Another program, or a process that was stopped in the meantime.
        connection.close()
        return None
    # Also a process that does not fit gets an answer, and can print what is wrong.
    meeting.connections.append(connection)
    index, name, count = hello["process_id"], hello["host"], hello["num_processes"]
    problem = None
    if count != meeting.count:
        problem = ValueError(
            f"process {index} on {name} was started with num_processes={count}, process 0 on "
            f"{meeting.names[0]} with {meeting.count}. Start all of them with the same number."
        )
    elif index in meeting.names:
        problem = ValueError(
            f"process_id={index} was given twice: on {meeting.names[index]} and on {name}. Give "
            f"each process its own, from 0 to {meeting.count - 1}."
        )
    meeting.names[index] = name
    return problem


def _answer(meeting: _Meeting, problem: Exception | None) -> None:
    """Tells every process that has come that all have come, or what is wrong."""
    message = {
        "problem": None if problem is None else str(problem),
        "kind": "timeout" if isinstance(problem, TimeoutError) else "value",
    }
    for connection in meeting.connections:
        _send(connection, message)
        connection.close()


def _missing(meeting: _Meeting, coordinator: str, timeout_s: float) -> TimeoutError:
    """Returns the error that names the processes that did not come."""
    # A process that never came has told nobody its host. A TPU pod and SLURM know their machines.
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    missing = []
    for i in range(meeting.count):
        if i not in meeting.names:
            known = f" ({workers[i]})" if len(workers) == meeting.count else ""
            missing.append(f"process {i}{known}")
    arrived = sorted(meeting.names.items())
    came = [f"process {i} on {name}" for i, name in arrived]
    of_job = f"The job's nodes are {nodes}. " if nodes else ""
    return TimeoutError(
        f"{_listed(missing)} of {meeting.count} did not join within {timeout_s:g} s. "
        f"Those that did: {_listed(came)}. {of_job}"
        "Was it started, with the same coordinator and number of processes, and does it reach "
        f"{coordinator}? {_WAIT_LONGER}"
    )


def _listed(words: list[str], most: int = 16) -> str:
    """Joins words by commas, and counts those beyond the first ones."""
    num_more = len(words) - most
    more = f" and {num_more} more" if num_more > 0 else ""
    return ", ".join(words[:most]) + more


# The other processes.


def _report(host: str, port: int, hosts: Hosts, timeout_s: float) -> None:
    """Tells process 0 that this process has come, and waits to hear that all have.

    Raises:
      ValueError, TimeoutError: process 0 says what is wrong, or does not answer.
      ConnectionError: process 0 went away.
    """
    with _connect(host, port, hosts, timeout_s) as connection:
        hello = {
            "format": _HELLO,
            "process_id": hosts.index,
            "num_processes": hosts.count,
            "host": socket.gethostname(),
        }
        _send(connection, hello)
        answer = _receive(connection, timeout_s + _GRACE_S)
    if "problem" not in answer:
        raise ConnectionError(
            f"process 0 at coordinator={host}:{port} went away, or another program listens there. "
            "Read what process 0 says, or choose another port."
        )
    if answer["problem"] is not None:
        kind = TimeoutError if answer["kind"] == "timeout" else ValueError
        raise kind(answer["problem"])


def _connect(host: str, port: int, hosts: Hosts, timeout_s: float) -> socket.socket:
    """Connects to process 0, which may start later than this process."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((host, port), timeout=_until(deadline))
        except OSError as error:
            # Refused connections and unknown hosts may be over in a moment, so all errors wait.
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"process 0 of {hosts.count} did not answer at coordinator={host}:{port} "
                    f"within {timeout_s:g} s ({error}). Was it started, is the address its own, "
                    f"and is the port open between the hosts? {_WAIT_LONGER}"
                ) from error
            time.sleep(min(_PAUSE_S, _until(deadline)))


# Both.


def _until(deadline: float) -> float:
    """Returns the seconds until a deadline, at least a millisecond."""
    seconds = deadline - time.monotonic()
    # A socket takes 0 for "do not block", which raises another error than a timeout.
    return max(0.001, seconds)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends one message."""
    line = json.dumps(message) + "\n"
    # If the other side has gone, its missing answer is the error that gets reported.
    with contextlib.suppress(OSError):
        connection.sendall(line.encode())


def _receive(connection: socket.socket, timeout_s: float) -> dict[str, Any]:
    """Receives one message; returns {} for anything else."""
    connection.settimeout(timeout_s)
    try:
        with connection.makefile("rb") as lines:
            # Another program may send without end.
            line = lines.readline(2**16)
            message = json.loads(line)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
