"""Threads for compiled functions, which share out their items by a counter.

The caller works as well, and never waits for a helper that has not begun: where all are busy with
someone else's items, it does its own.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(os.cpu_count() or 1, 1), "erniequant-product")


# A child of a fork has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)


LEAST_SHARE = 400.0
"""Microseconds of work that are worth a thread: waking one takes 50 to 300 of them."""


def run_items(
    function: Callable[..., None], items: int, *arguments: int, microseconds: float
) -> None:
    """Call ``function(counter, items, *arguments)`` on at most as many threads as torch uses here.

    microseconds: roughly, what one thread would take for all items.
    """
    if items == 0:
        return
    counter = torch.zeros(1, dtype=torch.int64)
    worth = max(int(microseconds / LEAST_SHARE), 1)
    threads = min(torch.get_num_threads(), items, worth)

    def work() -> None:
        function(counter.data_ptr(), items, *arguments)

    waiting = [_helpers().submit(work) for _ in range(threads - 1)]
    work()
    for helper in waiting:
        if not helper.cancel():
            helper.result()
