"""Spreads calls of a function over devices, by one thread per device."""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def over_devices(
    function: Callable[[_Item, jax.Device], _Result],
    items: Iterable[_Item],
    devices: Sequence[jax.Device],
) -> Iterator[_Result]:
    """Yields function(item, device) of each item as it comes, one at a time on each device.

    During a call, the device is the default device of JAX. After an error, the calls that have not
    begun are left out.
    """
    if len(devices) == 1:
        (device,) = devices
        with jax.default_device(device):
            yield from (function(item, device) for item in items)
        return
    # Each call takes the next device that is free: some items take much longer than others.
    free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def call(item: _Item) -> _Result:
        device = free.get()
        try:
            with jax.default_device(device):
                return function(item, device)
        finally:
            free.put(device)

    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(call, item) for item in items]
        with contextlib.ExitStack() as stack:
            # Before the pool's own exit, which would wait for all calls.
            stack.callback(pool.shutdown, cancel_futures=True)
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
