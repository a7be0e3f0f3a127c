"""Owns the folder of a run: where each file is, which rows it holds, and which process writes what.

Several runs, and several processes at once, may share a folder:

    config.json                      the config of the last run
    rows.jsonl                       one result row per run: pruning and training
    timing.jsonl                     how long each training run took, apart from its row
    failed.json                      the runs of the last grid that failed, with their errors
    sweep.json                       what all runs of a sweep have in common
    masks/RUN_ID.safetensors         the mask of a pruning run
    certificates/RUN_ID.json, .npz   the certificate of a certified run
    units/RUN_ID.json                the scores of each unit
    rewind/RUN_ID.safetensors        the training state that IMP rewinds to
    levels/RUN_ID/level-1.json, ...  the mask and the record of each level of IMP
    curves/RUN_ID.csv                loss and accuracy per epoch of a training run
    checkpoints/RUN_ID/              the checkpoints of a training run
    checkpoints/RUN_ID/level-1/      the checkpoints of a level of IMP
    layers.png, curve.png            pictures of the last run

    .RUN_ID.run.lock                 while a process works on the run

A file that every process of a job would write has the process in its name: process 3 of several
writes rows-0003.jsonl. Reading finds the rows of all processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from synflow_jax.storage import files, locks, rows
from synflow_jax.storage.rows import Row, RowFile

# The ending of a lock. Rows have locks of another ending, which stay.
_LOCK = ".run.lock"
# The folders that hold one file or one folder per run.
_FOLDERS = (
    "masks",
    "certificates",
    "units",
    "rewind",
    "levels",
    "curves",
    "checkpoints",
    "exported",
)


def check_run_id(run_id: Any) -> str:
    """Returns the name of a run, if it is one.

    Rows may come from other people, and a name such as "../../x" leads out of the folder.

    >>> check_run_id("vgg16-c10-s0")
    'vgg16-c10-s0'

    Raises:
      ValueError: it is none.
    """
    problem = rows.run_id_problem(run_id)
    if problem is not None:
        raise ValueError(f"{problem}. Take one from a row that prune.py or train.py wrote.")
    return str(run_id)


class Stopped(Exception):
    """Says that a run was asked to stop and has saved its state. The same command resumes it."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder that prune.py and train.py write to, `--workdir`. Creating one touches no file.

    >>> workdir = Workdir(pathlib.Path("runs/digits"))
    >>> workdir.mask_path("vgg16-1").as_posix()
    'runs/digits/masks/vgg16-1.safetensors'
    >>> workdir.relative(workdir.units_path("vgg16-1"))
    'units/vgg16-1.json'
    """

    path: pathlib.Path
    # What is known of the row files, by path, so that no run reads again what another has read.
    _known: dict[pathlib.Path, RowFile] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __str__(self) -> str:
        """Returns the path, so that messages can print the folder."""
        return str(self.path)

    # Files of a pruning run.

    def mask_path(self, run_id: str) -> pathlib.Path:
        """Returns the file of a mask; see `storage.save_mask`."""
        return self._file("masks", run_id, ".safetensors")

    def certificate_path(self, run_id: str) -> pathlib.Path:
        """Returns the JSON file of a certificate; see `storage.save_certificate`."""
        return self._file("certificates", run_id, ".json")

    def units_path(self, run_id: str) -> pathlib.Path:
        """Returns the JSON file of the units' scores.

        It holds {group: {"incoming": [one number per unit], "outgoing": [one number per unit]}}.
        """
        return self._file("units", run_id, ".json")

    # Files of iterative magnitude pruning (IMP). Curves and checkpoints of its levels are in the
    # folders that other training runs use, so that the same readers find them.

    def rewind_path(self, run_id: str) -> pathlib.Path:
        """Returns the file of the training state that IMP rewinds to; see `storage.save_arrays`.

        There is no such file if IMP rewinds to initialization.
        """
        return self._file("rewind", run_id, ".safetensors")

    def levels_path(self, run_id: str) -> pathlib.Path:
        """Returns the folder of IMP's levels."""
        return self._file("levels", run_id)

    def level_path(self, run_id: str, level: int) -> pathlib.Path:
        """Returns the JSON file that records a finished level, counted from 1."""
        return self.levels_path(run_id) / f"level-{level}.json"

    def level_mask_path(self, run_id: str, level: int) -> pathlib.Path:
        """Returns the file of the mask after a level, counted from 1."""
        return self.level_path(run_id, level).with_suffix(".safetensors")

    def level_curve_path(self, run_id: str, level: int) -> pathlib.Path:
        """Returns the CSV file of a level's training; level 0 trains up to the rewind step."""
        return self.curve_path(f"{check_run_id(run_id)}-level-{level}")

    def level_checkpoint_path(self, run_id: str, level: int) -> pathlib.Path:
        """Returns the folder of a level's checkpoints; level 0 trains up to the rewind step."""
        return self.checkpoint_path(run_id) / f"level-{level}"

    # Files of a training run.

    def curve_path(self, run_id: str) -> pathlib.Path:
        """Returns the CSV file of a training run: one line per epoch."""
        return self._file("curves", run_id, ".csv")

    def checkpoint_path(self, run_id: str) -> pathlib.Path:
        """Returns the folder of a run's checkpoints; see `storage.checkpoints`."""
        return self._file("checkpoints", run_id)

    def _file(self, folder: str, run_id: str, ending: str = "") -> pathlib.Path:
        """Returns the path of a file, or a folder, that is named after a run."""
        return self.path / folder / f"{check_run_id(run_id)}{ending}"

    # Files of the whole folder.

    @property
    def config_path(self) -> pathlib.Path:
        """Returns the JSON file of the config of the last run of this process."""
        return rows.of_this_process(self.path / "config.json")

    @property
    def failed_path(self) -> pathlib.Path:
        """Returns the JSON file of this process's failed runs; missing if none failed."""
        return rows.of_this_process(self.path / "failed.json")

    @property
    def sweep_path(self) -> pathlib.Path:
        """Returns the JSON file of everything that the runs of a sweep have in common."""
        # Process 0 alone writes it, so its name has no process.
        return self.path / "sweep.json"

    @property
    def layers_picture_path(self) -> pathlib.Path:
        """Returns the picture of how much of each layer the last pruning run kept."""
        return self.path / "layers.png"

    @property
    def curve_picture_path(self) -> pathlib.Path:
        """Returns the picture of the curve of the last training run."""
        return self.path / "curve.png"

    @property
    def exported_path(self) -> pathlib.Path:
        """Returns the folder that export.py writes to by default."""
        return self.path / "exported"

    def relative(self, path: pathlib.Path) -> str:
        """Returns a path of this folder as rows record it: relative, with forward slashes."""
        return path.relative_to(self.path).as_posix()

    # Rows.

    def check_rows(self) -> None:
        """Checks every row file. Call it before long work, which would find the damage too late.

        Raises:
          ValueError: a row file is damaged; names the file, the line and the cure.
        """
        for path in (self._rows_path, self._timing_path):
            self._files(path)

    def rows(self) -> list[Row]:
        """Reads the result rows of all processes: one per `run_id`, oldest first.

        If several files hold the same run, the row of the file that got a row last counts.

        Raises:
          ValueError: as `check_rows`.
        """
        found = self._files(self._rows_path)
        owners = rows.newest(found)
        by_id = {}
        for file in found:
            for row in rows.all_rows(file):
                run_id = row["run_id"]
                # It may have come since the owners were found.
                if owners.setdefault(run_id, file) is file:
                    by_id[run_id] = row
        return [by_id[run_id] for run_id in owners if run_id in by_id]

    def run_ids(self) -> list[str]:
        """Returns the names of all runs that have a row, oldest first.

        Raises:
          ValueError: as `check_rows`.
        """
        return list(rows.newest(self._files(self._rows_path)))

    def has_rows(self) -> bool:
        """Returns whether a process has written a row file here, even an empty one."""
        paths = rows.of_all_processes(self._rows_path)
        return any(path.exists() for path in paths)

    def find_row(self, run_id: str) -> Row | None:
        """Returns the row of a run, whichever process wrote it, or None if there is none.

        A folder is read once. Later calls read the rows that were added since, and this one.

        Raises:
          ValueError: as `check_rows`.
        """
        return self._find(self._rows_path, run_id)

    def where(self, run_id: str) -> str:
        """Says in which file and line the row of a run is, for messages about it."""
        file = self._owner(self._rows_path, run_id)
        return f"workdir={str(self.path)!r}" if file is None else rows.where(file, run_id)

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Adds a row to the file of this process. Older rows of the same `run_id` are deleted.

        Raises:
          ValueError: as `check_rows`. Nothing is written.
          OSError: a row file cannot be written.
        """
        self._write(self._rows_path, row)

    def delete_rows(self, run_ids: Collection[str]) -> None:
        """Deletes the rows of runs, and their times, from the files of all processes.

        On return they are off the disk, even after a power failure. Remove the files of a run after
        its row: a run that has a row counts as complete.

        Raises:
          ValueError: as `check_rows`.
          OSError: a row file cannot be written.
        """
        # The result comes first: times without a result do no harm.
        for path in (self._rows_path, self._timing_path):
            for file in self._files(path):
                rows.delete(file, run_ids)

    def timing(self, run_id: str) -> Row | None:
        """Returns how long a run took, as measured by the command that finished it, or None."""
        # Any process of an earlier command may have timed the run.
        return self._find(self._timing_path, run_id)

    def write_timing(self, row: Mapping[str, Any]) -> None:
        """Adds a row of times to the file of this process."""
        # Times are not in the result row, because that must be bit-identical if a run is repeated.
        self._write(self._timing_path, row)

    # Several processes in one folder.

    def lock(self, run_id: str) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from a run: hold it while files of the run are written or removed.

        Raises:
          locks.Busy: another process holds it. It is a ValueError that names the process.
          OSError: the file of the lock cannot be written.
        """
        return locks.hold(self.path / f".{check_run_id(run_id)}{_LOCK}", run_id)

    def clean(self) -> None:
        """Removes the temporary files and the locks that killed processes have left.

        Unfinished checkpoints are removed when their folder is opened to train on.
        """
        for folder in (self.path, *(self.path / name for name in _FOLDERS)):
            files.remove_stale(folder)
        for levels in (self.path / "levels").glob("*/"):
            files.remove_stale(levels)
        locks.remove_stale(self.path.glob(f".*{_LOCK}"))

    @property
    def _rows_path(self) -> pathlib.Path:
        return self.path / "rows.jsonl"

    @property
    def _timing_path(self) -> pathlib.Path:
        return self.path / "timing.jsonl"

    def _row_file(self, path: pathlib.Path) -> RowFile:
        """Returns what is known of a row file."""
        return self._known.setdefault(path, RowFile(path))

    def _files(self, path: pathlib.Path) -> list[RowFile]:
        """Returns the files of all processes, up to date."""
        found = [self._row_file(each) for each in rows.of_all_processes(path)]
        for file in found:
            rows.update(file)
        return found

    def _owner(self, path: pathlib.Path, run_id: str) -> RowFile | None:
        """Returns the file that holds the row of a run."""
        having = [file for file in self._files(path) if run_id in file.places]
        return rows.latest(having)

    def _find(self, path: pathlib.Path, run_id: str) -> Row | None:
        file = self._owner(path, run_id)
        return None if file is None else rows.find(file, run_id)

    def _write(self, path: pathlib.Path, row: Mapping[str, Any]) -> None:
        own = self._row_file(rows.of_this_process(path))
        others = [file for file in self._files(path) if file is not own]
        # First, since the new row would make this the newest file, and old rows count again.
        rows.delete(own, rows.superseded(own, others))
        rows.write(own, row)
        for other in others:
            rows.delete(other, {row["run_id"]})
