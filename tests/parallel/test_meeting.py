"""Tests the meeting of the processes of a job while strangers connect to its port.

Threads stand for processes, and only the loopback address is used.

- Whatever strangers send, genuine processes meet, and strangers are not counted.
- Without the genuine processes, strangers neither end the wait nor delay it beyond its timeout.
- What a stranger sends is read up to a limit only.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from synflow_jax.parallel import meeting

_HELLO = {"format": "synflow_jax hosts 1", "process_id": 1, "num_processes": 2, "host": "x"}


def _line(**changed: object) -> bytes:
    return json.dumps({**_HELLO, **changed}).encode() + b"\n"


# What strangers send, at once.
SENT = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "bytes that are no text": bytes(range(128, 256)) + b"\n",
    "nested JSON": b"[" * 4000 + b"\n",
    "a list": b"[1, 2]\n",
    "a number of 4,000 digits": b"1" * 4000 + b"\n",
    "no format": b'{"process_id": 1, "num_processes": 2, "host": "x"}\n',
    "another format": _line(format="synflow_jax hosts 9"),
    "an additional key": _line(more=1),
    "a list as process_id": _line(process_id=[1]),
    "a word as process_id": _line(process_id="1"),
    "true as process_id": _line(process_id=True),
    "a float as process_id": _line(process_id=1.0),
    "process_id too large": _line(process_id=999),
    "process_id negative": _line(process_id=-1),
    "process_id of process 0": _line(process_id=0),
    "no process_id": _line(process_id=None),
    "num_processes negative": _line(num_processes=-2),
    "num_processes too large": _line(num_processes=2**40),
    "host no text": _line(host=7),
    "host of several lines": _line(host="a\nb"),
    "host without end": _line(host="x" * 300),
    "hello and more": _line() + b"more\n",
    "two hellos": _line() + _line(),
}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclasses.dataclass
class _Visit:
    """The state of a stranger's visit.

    Attributes:
      arrived: set by the stranger when it has sent what it has to say.
      over: set by the test. The stranger then leaves.
    """

    arrived: threading.Event
    over: threading.Event


@contextlib.contextmanager
def _strangers(
    port: int, send: Callable[[socket.socket, _Visit], None]
) -> Iterator[threading.Event]:
    """Runs a stranger in a thread, which connects as soon as the port is open."""
    visit = _Visit(threading.Event(), threading.Event())

    def run() -> None:
        while not visit.over.is_set():
            with contextlib.suppress(OSError), _connect(port) as connection:
                send(connection, visit)
            time.sleep(0.01)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield visit.arrived
    finally:
        visit.over.set()
        thread.join()


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 1)


def _gather(port: int, count: int = 2, timeout_s: float = 0.4) -> float:
    """Returns how long process 0 waited until it named the missing process."""
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=f"process 1.* of {count} did not join within 0.4 s"):
        meeting.gather(f"127.0.0.1:{port}", port, count, timeout_s)
    return time.monotonic() - began


def _meet(port: int, count: int, *arrived: threading.Event) -> None:
    """Checks that `count` processes meet, of which all but process 0 come after the strangers."""
    for event in arrived:
        event.clear()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        done = [pool.submit(meeting.gather, f"127.0.0.1:{port}", port, count, 20)]
        for event in arrived:
            assert event.wait(20)
        for i in range(1, count):
            done.append(pool.submit(meeting.report, "127.0.0.1", port, i, count, 20))
        for future in done:
            assert future.result() is None


def test_strangers_are_not_counted_and_do_not_delay() -> None:
    """Sends every odd message at once. Two genuine processes meet all the same."""
    port = _free_port()

    def send_all(first: socket.socket, visit: _Visit) -> None:
        with contextlib.ExitStack() as stack:
            for content in SENT.values():
                connection = stack.enter_context(_connect(port))
                with contextlib.suppress(OSError):
                    connection.sendall(content)
            visit.arrived.set()
            first.recv(1)  # until the port is closed

    with _strangers(port, send_all) as arrived:
        assert _gather(port) < 1
        _meet(port, 2, arrived)


@pytest.mark.parametrize("content", SENT.values(), ids=SENT)
def test_no_odd_message_is_a_hello(content: bytes) -> None:
    line, _, rest = content.partition(b"\n")
    assert meeting._parse_hello(content) is None or rest
    assert rest or meeting._parse_hello(line) is None
    assert meeting._parse_hello(_line()) is not None


def test_a_byte_at_a_time_and_a_line_without_end() -> None:
    port = _free_port()

    def drip(connection: socket.socket, visit: _Visit) -> None:
        while not visit.over.wait(0.05):
            connection.sendall(b" ")
            visit.arrived.set()

    def flood(connection: socket.socket, visit: _Visit) -> None:
        while not visit.over.is_set():
            connection.sendall(bytes(2**20))
            visit.arrived.set()

    with _strangers(port, drip) as dripped, _strangers(port, flood):
        assert _gather(port) < 1
        _meet(port, 2, dripped)


@pytest.mark.slow
def test_hundreds_of_silent_connections() -> None:
    """Opens more connections than are kept, before genuine processes come."""
    port = _free_port()

    def crowd(first: socket.socket, visit: _Visit) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(_connect(port))
            visit.arrived.set()
            visit.over.wait()

    with _strangers(port, crowd) as arrived:
        _meet(port, 4, arrived)


def test_a_process_that_left_is_not_counted() -> None:
    """Says hello and goes away. The process that comes in its place is counted once."""
    port = _free_port()

    def leave(connection: socket.socket, visit: _Visit) -> None:
        connection.sendall(_line(num_processes=3))
        connection.close()
        visit.over.wait()

    with _strangers(port, leave):
        assert _gather(port, count=3) < 1
    _meet(port, 2)


def test_a_stranger_in_place_of_process_0() -> None:
    """Sends bytes that are no answer, from another program at the coordinator's port."""
    for content in (b"220 mail.example.org\r\n", b'{"problem": 1, "kind": "value"}\n'):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]

            def serve(server: socket.socket = server, content: bytes = content) -> None:
                connection, _ = server.accept()
                connection.sendall(content)
                connection.close()

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(ConnectionError, match="another program listens there"):
                meeting.report("127.0.0.1", port, 1, 2, 5)
            thread.join()


def test_process_0_listens_at_the_coordinators_address_alone() -> None:
    port = _free_port()
    with meeting._listen(f"127.0.0.1:{port}", port) as server:
        assert server.getsockname() == ("127.0.0.1", port)
    # An address that this machine does not have is translated on the way: all are open.
    with meeting._listen(f"192.0.2.1:{port}", port) as server:
        assert server.getsockname()[0] in ("::", "0.0.0.0")
