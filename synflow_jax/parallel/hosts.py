"""Joins several processes into one job, and divides work between them.

`jax.distributed` joins processes too. But if one of them never comes, XLA aborts all others without
saying which one is missing. So the processes meet first, on the port that JAX takes afterwards (see
`meeting`). Process 0 waits for all others. Then it tells them that all have come, or what is wrong.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import TypeVar

import jax

from synflow_jax.parallel.meeting import MAX_PROCESSES, bind_address, parse_address
from synflow_jax.parallel.meeting import gather as _gather
from synflow_jax.parallel.meeting import report as _report

_T = TypeVar("_T")
# A process that is done waits for the others, whose share may take hours longer. By default JAX
# aborts all of them after 5 minutes.
_SHUTDOWN_S = 30 * 24 * 3600
_LONGEST_S = _SHUTDOWN_S


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
    _check_timeout(timeout_s)
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
    host, port = parse_address(coordinator)
    # A job of one process needs no port.
    if hosts.count == 1:
        return ALONE
    # The meeting, and only then JAX: from there on a missing process aborts all others.
    if hosts.index == 0:
        _gather(coordinator, port, hosts.count, timeout_s)
    else:
        _report(host, port, hosts.index, hosts.count, timeout_s)
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


def _check_timeout(timeout_s: float) -> None:
    """Checks that a timeout is a time that sockets can wait.

    Raises:
      ValueError: it is not.
    """
    is_number = isinstance(timeout_s, numbers.Real) and not isinstance(timeout_s, bool)
    if not is_number or not 0 < timeout_s <= _LONGEST_S:
        raise ValueError(
            f"timeout_s={timeout_s!r} must be positive and at most {_LONGEST_S}: seconds to wait "
            "for all processes."
        )


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
    # Each kind of cluster has variables of its own, and JAX raises what it happens to find in them.
    except Exception as error:
        raise ValueError(
            f"cluster=True: JAX {jax.__version__} cannot read this job's variables ({error!r}). "
            "Give coordinator, num_processes and process_id."
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
    values = (process_id, num_processes)
    are_integers = all(
        isinstance(value, numbers.Integral) and not isinstance(value, bool) for value in values
    )
    if not are_integers or not 0 <= process_id < num_processes <= MAX_PROCESSES:
        raise ValueError(
            f"process_id={process_id!r} and num_processes={num_processes!r}: there must be at "
            f"least one process and at most {MAX_PROCESSES}, and they are numbered from 0 to "
            "num_processes - 1."
        )
    return Hosts(int(process_id), int(num_processes))


def _initialize(coordinator: str, hosts: Hosts, timeout_s: float) -> None:
    """Initializes `jax.distributed` for processes that have met."""
    # JAX's service would catch SIGTERM. The commands need that signal: on it they save their state.
    jax.config.update("jax_enable_preemption_service", False)
    host, port = parse_address(coordinator)
    address = bind_address(host)
    in_brackets = f"[{address}]" if ":" in address else address
    jax.distributed.initialize(
        coordinator,
        hosts.count,
        hosts.index,
        # By default JAX listens at all addresses.
        coordinator_bind_address=f"{in_brackets}:{port}" if address else None,
        initialization_timeout=max(60, round(timeout_s)),
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )
