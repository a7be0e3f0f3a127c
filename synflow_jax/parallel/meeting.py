"""Lets the processes of a job meet before JAX joins them, so that a missing one can be named.

Process 0 listens on the coordinator's port. Each other process exchanges two JSON lines with it:

    process i -> 0    {"format": ..., "process_id": i, "num_processes": n, "host": NAME}
    0 -> process i    {"problem": null}, or {"problem": MESSAGE, "kind": "timeout" or "value"}

Anyone can connect to the port. What a stranger sends is bounded in size and in time, and whoever
does not say hello is not a process of the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_PROCESSES = 2**16

_FORMAT = "synflow_jax hosts 1"
_PAUSE_S = 0.1  # between two attempts to reach process 0
_HELLO_S = 5  # how long a process may take to say hello after it has connected
_GRACE_S = 10  # how much longer than process 0 the others wait for its answer
_TRIES = 5  # how often a process says hello before it gives up
_MOST_STRANGERS = 128  # connections that have not said hello
_LONGEST_HELLO = 2**12  # bytes
_LONGEST_ANSWER = 2**16
_LONGEST_NAME = 255
_WAIT_LONGER = "A longer timeout (--join_timeout) waits longer."


class _Hello(NamedTuple):
    """The first line that a process sends."""

    format: str
    process_id: int
    num_processes: int
    host: str


class _Answer(NamedTuple):
    """The line that process 0 answers with.

    Attributes:
      problem: None, or the message of the error that all processes raise.
      kind: "timeout" or "value", the type of the error.
    """

    problem: str | None
    kind: str


# Addresses


def parse_address(coordinator: str) -> tuple[str, int]:
    """Splits HOST:PORT.

    Raises:
      ValueError: it has another form.
    """
    # From the right: an IPv6 address has colons too.
    host, _, port = str(coordinator).rpartition(":")
    is_number = port.isdecimal() and len(port) <= 5
    if not host or not is_number or not 0 < int(port) < 2**16:
        raise ValueError(
            f"coordinator={coordinator!r} must be HOST:PORT of process 0, for instance "
            "10.0.0.1:8476."
        )
    return host.strip("[]"), int(port)


def bind_address(host: str) -> str:
    """Returns the address that process 0 listens at; "" for all addresses of its machine.

    The other processes connect to the coordinator's address, so no other one has to be open. A name
    may have another address on its own machine than elsewhere, and a router may translate an
    address: then all are open.

    >>> bind_address("127.0.0.1"), bind_address("localhost"), bind_address("node-7")
    ('127.0.0.1', '127.0.0.1', '')
    """
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if address.is_unspecified:
        return ""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return ""
    return host


# Process 0


@dataclasses.dataclass
class _Stranger:
    """A connection that has not said hello.

    Attributes:
      until: the time at which it is closed.
      received: what it has sent so far.
    """

    until: float
    received: bytes = b""


@dataclasses.dataclass
class _Meeting:
    """What process 0 knows of the others. The functions below change it.

    Attributes:
      count: the number of processes.
      selector: waits for all connections and for the port.
      names: the host of each process that has come, by number.
      members: the number of each process that waits for an answer, by connection.
      strangers: the other connections, the oldest first.
    """

    count: int
    selector: selectors.BaseSelector
    names: dict[int, str]
    members: dict[socket.socket, int]
    strangers: dict[socket.socket, _Stranger]


def gather(coordinator: str, port: int, count: int, timeout_s: float) -> None:
    """Waits for all other processes. Then tells them that all have come, or what is wrong.

    Anyone can connect to the port. A connection that does not say hello within a few seconds, or
    says anything else, is closed. It delays nobody: one loop listens to all of them.

    Raises:
      ValueError, TimeoutError: a process does not fit or did not come. All others raise the same.
      OSError: the port is taken.
    """
    deadline = time.monotonic() + timeout_s
    names = {0: socket.gethostname()}
    problem: Exception | None = None
    with _listen(coordinator, port) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        meeting = _Meeting(count, selector, names, members={}, strangers={})
        while len(names) < count and problem is None:
            if time.monotonic() < deadline:
                problem = _hear(meeting, server, min(_PAUSE_S, _until(deadline)))
            else:
                problem = _missing(meeting, coordinator, timeout_s)
        for connection in list(meeting.strangers):
            _close(meeting, connection)
    # JAX takes the port next, so it must be free before any process is told that all have come.
    _answer(meeting, problem)
    if problem is not None:
        raise problem


def _listen(coordinator: str, port: int) -> socket.socket:
    """Opens the port of the meeting; see `bind_address` for who can reach it."""
    host, _ = parse_address(coordinator)
    address = bind_address(host)
    dual = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in address else socket.AF_INET
    try:
        server = socket.create_server(
            (address, port), family=family, backlog=_MOST_STRANGERS, dualstack_ipv6=dual
        )
    except OSError as error:
        raise OSError(
            f"coordinator={coordinator!r}: port {port} cannot be used: {error}. Choose another."
        ) from error
    server.setblocking(False)
    return server


def _hear(meeting: _Meeting, server: socket.socket, timeout_s: float) -> ValueError | None:
    """Waits until something arrives, and reads it. Returns the error of the first misfit."""
    for key, _ in meeting.selector.select(timeout_s):
        connection = key.fileobj
        assert isinstance(connection, socket.socket)
        if connection is server:
            _accept(meeting, server)
        elif connection in meeting.members:
            # A process is silent until it is answered. This one has ended, or is no process.
            meeting.names.pop(meeting.members.pop(connection))
            _close(meeting, connection)
        elif connection in meeting.strangers:
            problem = _read(meeting, connection)
            if problem is not None:
                return problem
    now = time.monotonic()
    late = [connection for connection, known in meeting.strangers.items() if known.until < now]
    for connection in late:
        _close(meeting, connection)
    return None


def _accept(meeting: _Meeting, server: socket.socket) -> None:
    """Accepts one connection."""
    try:
        connection, _ = server.accept()
    except (BlockingIOError, ConnectionError):
        return  # it has already gone
    except OSError:
        # Too many files are open. A process says hello as soon as it has connected, so the oldest
        # connection is the least likely to be one.
        if not _close_oldest(meeting):
            time.sleep(_PAUSE_S)
        return
    if len(meeting.strangers) >= _MOST_STRANGERS:
        _close_oldest(meeting)
    connection.setblocking(False)
    meeting.strangers[connection] = _Stranger(time.monotonic() + _HELLO_S)
    meeting.selector.register(connection, selectors.EVENT_READ)


def _read(meeting: _Meeting, connection: socket.socket) -> ValueError | None:
    """Reads from a connection. Returns the error if it is a process that does not fit the job."""
    stranger = meeting.strangers[connection]
    try:
        part = connection.recv(_LONGEST_HELLO)
    except BlockingIOError:
        return None
    except OSError:
        part = b""
    stranger.received += part
    line, newline, rest = stranger.received.partition(b"\n")
    if not newline and part and len(line) < _LONGEST_HELLO:
        return None  # the rest of the line is on its way
    hello = None if rest or not newline else _parse_hello(line)
    if hello is None:
        _close(meeting, connection)
        return None
    # Also a process that does not fit gets an answer, and can print what is wrong.
    del meeting.strangers[connection]
    meeting.members[connection] = hello.process_id
    return _welcome(meeting, hello)


def _welcome(meeting: _Meeting, hello: _Hello) -> ValueError | None:
    """Records a process. Returns the error if it does not fit the job."""
    index, names = hello.process_id, meeting.names
    if hello.num_processes != meeting.count:
        return ValueError(
            f"process {index} on {hello.host} was started with "
            f"num_processes={hello.num_processes}, process 0 on {names[0]} with {meeting.count}. "
            "Start all of them with the same number."
        )
    if index in names:
        return ValueError(
            f"process_id={index} was given twice: on {names[index]} and on {hello.host}. Give "
            f"each process its own, from 0 to {meeting.count - 1}."
        )
    names[index] = hello.host
    return None


def _close_oldest(meeting: _Meeting) -> bool:
    """Closes the oldest connection that has not said hello. Returns whether there was one."""
    oldest = next(iter(meeting.strangers), None)
    if oldest is not None:
        _close(meeting, oldest)
    return oldest is not None


def _close(meeting: _Meeting, connection: socket.socket) -> None:
    """Closes a connection and forgets it."""
    meeting.strangers.pop(connection, None)
    meeting.selector.unregister(connection)
    connection.close()


def _answer(meeting: _Meeting, problem: Exception | None) -> None:
    """Tells every process that has come that all have come, or what is wrong."""
    text = None if problem is None else str(problem)
    kind = "timeout" if isinstance(problem, TimeoutError) else "value"
    message = _Answer(text, kind)._asdict()
    for connection in meeting.members:
        connection.settimeout(_PAUSE_S)
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


# The other processes


def report(host: str, port: int, index: int, count: int, timeout_s: float) -> None:
    """Tells process 0 that process `index` of `count` has come, and waits until all have.

    Raises:
      ValueError, TimeoutError: process 0 says what is wrong, or does not answer.
      ConnectionError: process 0 went away.
    """
    deadline = time.monotonic() + timeout_s
    hello = _Hello(_FORMAT, index, count, socket.gethostname())
    with _connect(host, port, count, timeout_s, deadline) as connection:
        line = _say(connection, hello, deadline)
    # Process 0 closes connections unheard while strangers flood its port, and when it is stopped
    # and started again. Then this process says hello again.
    for _ in range(_TRIES):
        if line or time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE_S)
        with contextlib.suppress(OSError), _open(host, port, deadline) as connection:
            line = _say(connection, hello, deadline)
    answer = _parse_answer(line)
    if answer is None:
        raise ConnectionError(
            f"process 0 at coordinator={host}:{port} went away, or another program listens there. "
            "Read what process 0 says, or choose another port."
        )
    if answer.problem is not None:
        kind = TimeoutError if answer.kind == "timeout" else ValueError
        raise kind(answer.problem)


def _say(connection: socket.socket, hello: _Hello, deadline: float) -> bytes:
    """Says hello, and returns the line that process 0 answers with; b"" if it closes."""
    _send(connection, hello._asdict())
    return _receive_line(connection, deadline + _GRACE_S)


def _connect(host: str, port: int, count: int, timeout_s: float, deadline: float) -> socket.socket:
    """Connects to process 0, which may start later than this process."""
    while True:
        try:
            return _open(host, port, deadline)
        except OSError as error:
            # Refused connections and unknown hosts may be over in a moment, so all errors wait.
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"process 0 of {count} did not answer at coordinator={host}:{port} "
                    f"within {timeout_s:g} s ({error}). Was it started, is the address its own, "
                    f"and is the port open between the hosts? {_WAIT_LONGER}"
                ) from error
            time.sleep(min(_PAUSE_S, _until(deadline)))


def _open(host: str, port: int, deadline: float) -> socket.socket:
    """Connects to a port once."""
    connection = socket.create_connection((host, port), timeout=_until(deadline))
    # Where nobody listens at a port of this machine, the system may choose the same port for this
    # end, and connects it to itself.
    if connection.getsockname() == connection.getpeername():
        connection.close()
        raise ConnectionRefusedError("nobody listens there")
    return connection


# Messages


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends one message."""
    line = json.dumps(message) + "\n"
    # If the other side has gone, its missing answer is the error that gets reported.
    with contextlib.suppress(OSError):
        connection.sendall(line.encode())


def _receive_line(connection: socket.socket, deadline: float) -> bytes:
    """Receives one line, or the part of it that has come before the deadline or the end."""
    received = b""
    while b"\n" not in received and len(received) < _LONGEST_ANSWER:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            break
        try:
            connection.settimeout(seconds)
            part = connection.recv(_LONGEST_ANSWER)
        except OSError:
            break
        if not part:
            break
        received += part
    return received


def _parse(line: bytes, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """Returns the message of a line, or None if it is not an object with just these keys."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or set(message) != set(keys):
        return None
    return message


def _parse_hello(line: bytes) -> _Hello | None:
    """Returns the hello of a process, or None for anything else."""
    message = _parse(line, _Hello._fields)
    if message is None or message["format"] != _FORMAT:
        return None
    index, count, host = message["process_id"], message["num_processes"], message["host"]
    # Not `isinstance`: to Python, true is a whole number.
    are_integers = type(index) is int and type(count) is int
    # Process 0 never says hello to itself.
    if not are_integers or not 0 < index < count <= MAX_PROCESSES:
        return None
    is_name = isinstance(host, str) and host.isprintable() and len(host) <= _LONGEST_NAME
    return _Hello(_FORMAT, index, count, host) if is_name else None


def _parse_answer(line: bytes) -> _Answer | None:
    """Returns the answer of process 0, or None for anything else."""
    message = _parse(line, _Answer._fields)
    if message is None:
        return None
    answer = _Answer(**message)
    is_problem = answer.problem is None or isinstance(answer.problem, str)
    return answer if is_problem and answer.kind in ("timeout", "value") else None


def _until(deadline: float) -> float:
    """Returns the seconds until a deadline, at least a millisecond."""
    seconds = deadline - time.monotonic()
    # A socket takes 0 for "do not block", which raises another error than a timeout.
    return max(0.001, seconds)
