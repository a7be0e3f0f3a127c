"""Reads and writes rows of results: JSON lines, one row per run.

A row is appended, so that a grid of n runs costs n writes of one line. A process that dies while it
appends leaves a line without its end, which readers leave out and the next writer cuts off. Only a
row that is replaced or deleted makes the file anew.

A `RowFile` knows where each row is. It reads a file once, and afterwards only what was appended.

Several processes of one machine may write to a file at the same time. A lock file in the same
folder, such as .rows.jsonl.lock, keeps one process from losing the rows of another. The processes
of one job may run on several machines, where locks cannot be relied on, so each writes a separate
file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import re
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, NoReturn

import jax

from synflow_jax.storage import files
from synflow_jax.storage.files import AnyPath

Row = dict[str, Any]

# Names of files are made of it, so it must not lead to another folder. With an ending it must fit
# into the 255 bytes that file systems allow.
_RUN_ID = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,199}")
_BOM = b"\xef\xbb\xbf"
# How much of a file is compared, to tell a file that has grown from one that was written anew.
_NUM_TAIL_BYTES = 64


class Place(NamedTuple):
    """The place of a row in its file: the line, from 1, and where its bytes begin and end."""

    line: int
    start: int
    end: int


class Stamp(NamedTuple):
    """The state of a file, which changes whenever it is written. All are of `os.stat`."""

    device: int
    inode: int
    size: int
    mtime_ns: int


@dataclasses.dataclass
class RowFile:
    """The rows of one file, as they were when it was last read; see `update`.

    Attributes:
      path: of the file.
      places: of the rows, by `run_id`, in the order of the file.
      stamp: the state of the file; None if there was none.
      end: how many bytes are whole lines.
      num_lines: how many lines these are.
      tail: the last bytes before `end`.
      has_newline: whether the last line ends in a newline.
      lock: held while the other attributes change: threads of one process share a file.
    """

    path: pathlib.Path
    places: dict[str, Place] = dataclasses.field(default_factory=dict)
    stamp: Stamp | None = None
    end: int = 0
    num_lines: int = 0
    tail: bytes = b""
    has_newline: bool = True
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock, repr=False)


# Reading


def read_rows(path: AnyPath) -> list[Row]:
    """Reads the rows of one file, oldest first; [] if there is no file.

    Raises:
      ValueError: the file or a line of it is damaged; names the file, the line and the cure.
    """
    return all_rows(RowFile(pathlib.Path(path)))


def update(file: RowFile) -> None:
    """Reads the lines that were added since the last call; all of them if the file is another.

    Raises:
      ValueError: as `read_rows`.
    """
    with file.lock:
        stamp = _stamp(file.path)
        if stamp == file.stamp:
            return
        if stamp is None:
            _forget(file)
            return
        with _open(file.path) as opened:
            # It may have been replaced since.
            stamp = _stamp_of(os.fstat(opened.fileno()))
            if not _has_grown(file, stamp, opened.fileno()):
                _forget(file)
            opened.seek(file.end)
            for line in opened:
                _add_line(file, line)
        # If lines come meanwhile, the next call finds another stamp, and reads on.
        file.stamp = stamp


def find(file: RowFile, run_id: str) -> Row | None:
    """Returns the row of a run, or None if the file has none.

    Raises:
      ValueError: as `read_rows`.
    """
    with file.lock, _opened(file) as opened:
        if opened is None or run_id not in file.places:
            return None
        return _row_at(file, opened, run_id)


def all_rows(file: RowFile) -> list[Row]:
    """Returns the rows of a file, oldest first.

    Raises:
      ValueError: as `read_rows`.
    """
    with file.lock, _opened(file) as opened:
        return [_row_at(file, opened, run_id) for run_id in file.places]


def where(file: RowFile, run_id: str) -> str:
    """Says where the row of a run is, for messages."""
    return f"row file {str(file.path)!r}, line {file.places[run_id].line}"


@contextlib.contextmanager
def _opened(file: RowFile) -> Iterator[IO[bytes] | None]:
    """Opens the file that a `RowFile`, which it brings up to date, is about; None if there is none.

    Until it is closed, its rows stay where they are: whoever deletes a row makes a new file.
    """
    while True:
        update(file)
        if file.stamp is None:
            yield None
            return
        with _open(file.path) as opened:
            found = _stamp_of(os.fstat(opened.fileno()))
            # Between the two another process may have replaced it.
            if found[:2] == file.stamp[:2]:
                yield opened
                return


def _stamp(path: pathlib.Path) -> Stamp | None:
    """Returns the state of a file, or None if there is none.

    Raises:
      ValueError: it is no regular file.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    # Before it is opened: reading a named pipe or a device would never end.
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise ValueError(
            f"row file {str(path)!r} is {kind}, not a file. Move it away, or choose another folder."
        )
    return _stamp_of(found)


def _stamp_of(found: os.stat_result) -> Stamp:
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _open(path: pathlib.Path) -> IO[bytes]:
    """Opens a row file for reading."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: pathlib.Path, error: OSError) -> ValueError:
    return ValueError(
        f"row file {str(path)!r} cannot be read: {error.strerror}. Check its permissions."
    )


def _forget(file: RowFile) -> None:
    """Makes a `RowFile` what it is before the first reading."""
    new = RowFile(file.path)
    for field in dataclasses.fields(RowFile):
        if field.name != "lock":
            setattr(file, field.name, getattr(new, field.name))


def _has_grown(file: RowFile, stamp: Stamp, descriptor: int) -> bool:
    """Returns whether a file is the known one, with more lines at its end."""
    if file.stamp is None or file.stamp[:2] != stamp[:2] or stamp.size < file.end:
        return False
    found = os.pread(descriptor, len(file.tail), file.end - len(file.tail))
    return found == file.tail


def _add_line(file: RowFile, line: bytes) -> None:
    """Adds the next line of the file to what is known of it.

    Raises:
      ValueError: it is not a row.
    """
    # This ends the line before, which had no newline when it was read.
    if not file.has_newline and not line.strip(b"\r\n"):
        _advance(file, line)
        return
    ended = line.endswith(b"\n")
    number = file.num_lines + 1
    try:
        row = _parse(line, file.path, number)
    except ValueError:
        # The writer was killed, or is about to write the rest.
        if not ended and _may_be_unfinished(line):
            return
        raise
    run_id = row["run_id"]
    # The newest row of a run comes last.
    file.places.pop(run_id, None)
    file.places[run_id] = Place(number, file.end, file.end + len(line))
    file.num_lines = number
    _advance(file, line)


def _may_be_unfinished(line: bytes) -> bool:
    """Returns whether a line without its end is the beginning of a row, which a writer cuts off.

    Any other text is of a file that is not ours.
    """
    beginning = b'{"'
    content = line.removeprefix(_BOM)
    # A power failure may leave zeros in place of what was written.
    return content.startswith(beginning) or beginning.startswith(content) or not line.strip(b"\0")


def _advance(file: RowFile, content: bytes) -> None:
    """Moves the end of what is known behind these bytes."""
    file.end += len(content)
    file.tail = (file.tail + content)[-_NUM_TAIL_BYTES:]
    file.has_newline = content.endswith(b"\n")


def _row_at(file: RowFile, opened: IO[bytes] | None, run_id: str) -> Row:
    """Reads the row of a run from its place.

    Raises:
      ValueError: another row is there.
    """
    assert opened is not None, "a file that has rows exists"
    place = file.places[run_id]
    opened.seek(place.start)
    line = opened.read(place.end - place.start)
    try:
        row = _parse(line, file.path, place.line)
    except ValueError:
        row = {}
    if row.get("run_id") != run_id:
        # An editor has written into the file itself. The next call reads all of it again.
        _forget(file)
        raise ValueError(
            f"row file {str(file.path)!r} was edited while this command used it. Run it again."
        )
    return row


def _parse(line: bytes, path: pathlib.Path, number: int) -> Row:
    """Parses one line of a row file.

    Raises:
      ValueError: it is not a row.
    """
    where = f"row file {str(path)!r}, line {number}"
    cure = "Delete that line, and repeat the run that it held."
    # Some editors put a mark at the beginning of a file.
    content = line.removeprefix(_BOM) if number == 1 else line
    try:
        row = json.loads(content.decode(), parse_constant=_refuse_constant)
    # A ValueError is also of bytes that are not UTF-8, and of integers of thousands of digits.
    except (ValueError, RecursionError):
        row = None
    # Every reader finds rows by their run, so a row without one is damaged too.
    if not isinstance(row, dict) or "run_id" not in row:
        start = content[:60].decode(errors="replace").rstrip("\r\n")
        raise ValueError(
            f"{where}: {start!r} is not a result row (a JSON object with a run_id). {cure}"
        )
    problem = run_id_problem(row["run_id"])
    if problem is not None:
        raise ValueError(f"{where}: {problem}. {cure}")
    return row


def run_id_problem(run_id: Any) -> str | None:
    """Says why a value is not the name of a run; None if it is one."""
    if isinstance(run_id, str) and _RUN_ID.fullmatch(run_id):
        return None
    shown = repr(run_id)[:60]
    return (
        f"run_id={shown} is not the name of a run: 1 to 200 letters, digits and _ . + -, the first "
        "of them no dot"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Writing


def write_row(path: AnyPath, row: Mapping[str, Any]) -> None:
    """Adds a row to a file. An older row of the same `run_id` is removed.

    It reads the whole file first. To write many rows, use `Workdir.write_row`, which reads it once.

    Raises:
      ValueError: as `read_rows`; or the `run_id` is not the name of a run. Nothing is written.
      OSError: the file cannot be written. Its rows are unchanged.
    """
    write(RowFile(pathlib.Path(path)), row)


def write(file: RowFile, row: Mapping[str, Any]) -> None:
    """Adds a row to a file, as `write_row` does, and reads only what was added since `update`."""
    run_id = row.get("run_id")
    problem = run_id_problem(run_id)
    if problem is not None:
        raise ValueError(f"{problem}. It names the files of the run.")
    text = json.dumps(files.to_json(row), allow_nan=False)
    line = f"{text}\n".encode()
    # Reading is under the lock too: a row that comes between reading and writing would be lost.
    with file.lock, _locked(file.path):
        update(file)
        if run_id in file.places:
            _rewrite(file, without={str(run_id)}, added=line)
        else:
            _append(file, line)
        update(file)


def delete(file: RowFile, run_ids: Collection[str]) -> None:
    """Deletes the rows of runs from a file, if it has them. On return they are off the disk.

    Raises:
      ValueError: as `read_rows`. Nothing is deleted.
      OSError: the file cannot be written. Its rows are unchanged.
    """
    update(file)
    if file.places.keys().isdisjoint(run_ids):
        return
    with file.lock, _locked(file.path):
        update(file)
        before = file.path.stat()
        _rewrite(file, without=set(run_ids))
        # The time tells which file got a row last; see `latest`.
        os.utime(file.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        update(file)


def _append(file: RowFile, line: bytes) -> None:
    """Writes a line at the end of the file, and waits until it is on the disk."""
    is_new = file.stamp is None
    content = line if file.has_newline else b"\n" + line
    try:
        with open(file.path, "ab", buffering=0) as opened:
            # A writer that was killed has left the beginning of a line.
            if os.fstat(opened.fileno()).st_size > file.end:
                opened.truncate(file.end)
            _write_all(opened, content, file.end)
        if is_new:
            files.sync(file.path.parent)
    except OSError as error:
        raise files.unwritable(file.path, error) from error


def _write_all(opened: io.FileIO, content: bytes, end: int) -> None:
    """Writes at the end of a file that is `end` bytes long; all of it or nothing."""
    try:
        num_written = 0
        while num_written < len(content):
            num_written += opened.write(content[num_written:])
        os.fsync(opened.fileno())
    # BaseException, because an interrupt must not leave a part of the line behind either.
    except BaseException:
        opened.truncate(end)
        raise


def _rewrite(file: RowFile, *, without: set[str], added: bytes = b"") -> None:
    """Writes the file anew, without the rows of some runs and with a line at its end."""
    parts = []
    with _open(file.path) as opened:
        for run_id, place in file.places.items():
            if run_id not in without:
                opened.seek(place.start)
                line = opened.read(place.end - place.start)
                parts.append(line.removeprefix(_BOM).rstrip(b"\r\n") + b"\n")
    files.write_bytes(file.path, b"".join([*parts, added]))


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes of this machine from writing a file."""
    # The file itself cannot be the lock. Writing replaces it, and a lock stays on the old file.
    lock_path = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise files.unwritable(lock_path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        # Which also gives up the lock.
        os.close(lock)


# The files of several processes


def of_this_process(path: pathlib.Path) -> pathlib.Path:
    """Returns the file to write in place of one that all processes of a job would write.

    A single process writes rows.jsonl itself; process 3 of several writes rows-0003.jsonl.
    The call starts JAX, which must not happen before the processes have joined.
    """
    if jax.process_count() == 1:
        return path
    index = jax.process_index()
    # Four digits, so that sorting the names sorts the processes.
    return path.with_stem(f"{path.stem}-{index:04d}")


def of_all_processes(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns every file that `of_this_process` may name, in the order of the processes.

    The first of them, that of a single process, may not exist. Other files of similar names, such
    as rows-backup.jsonl, are left alone.
    """
    name = re.compile(rf"{re.escape(path.stem)}-[0-9]+{re.escape(path.suffix)}")
    beside = path.parent.glob(f"{path.stem}-*{path.suffix}")
    of_jobs = [other for other in beside if name.fullmatch(other.name)]
    return [path, *sorted(of_jobs)]


def newest(found: Iterable[RowFile]) -> dict[str, RowFile]:
    """Returns, for each run, the file whose row counts; see `latest`. Runs come oldest first."""
    owners: dict[str, RowFile] = {}
    for file in found:
        for run_id in file.places:
            other = owners.get(run_id)
            # Setting a key again keeps its place: where the run came first.
            owners[run_id] = file if other is None else latest([other, file]) or file
    return owners


def latest(having: Sequence[RowFile]) -> RowFile | None:
    """Returns the file whose row of a run counts, of those that have one; None of no files.

    A run has one row, since writing a row deletes older ones. Folders of earlier versions may hold
    two, in the files of different processes. Then the row of the file that got a row last counts.

    Args:
      having: in the order of the processes. Of files of the same time, the last one counts.
    """
    return max(reversed(having), key=_written, default=None)


def superseded(file: RowFile, others: Iterable[RowFile]) -> set[str]:
    """Returns the runs of a file for which another file holds a newer row."""
    found: set[str] = set()
    for other in others:
        if _written(other) > _written(file):
            found |= file.places.keys() & other.places.keys()
    return found


def _written(file: RowFile) -> int:
    """Returns when a file got its last row."""
    return 0 if file.stamp is None else file.stamp.mtime_ns
