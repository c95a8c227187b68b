"""Work shared out over threads, its results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
_TOGETHER = 64


def map_files(
    work: Callable[[Item], Made], items: Sequence[Item], *, threads: int, name: str
) -> Iterator[Made]:
    """Yield what some brief work makes of each item, in order.

    Many at a time are handed to a thread: handing over one costs more than reading a small file.
    """
    parts = [items[start : start + _TOGETHER] for start in range(0, len(items), _TOGETHER)]
    made = in_order(
        lambda part: [work(item) for item in part],
        parts,
        threads=threads,
        ahead=len(parts),
        name=name,
    )
    return chain.from_iterable(made)


def in_order(
    work: Callable[[Item], Made],
    items: Iterable[Item],
    *,
    threads: int,
    ahead: int,
    name: str,
    begin: Callable[[], object] | None = None,
) -> Iterator[Made]:
    """Yield what `work` makes of each item, in order; at most `ahead` results wait in memory.

    The threads are called `name`; each calls `begin` first. An error is raised in its turn. A
    stream that is abandoned, or fails, does not work on the rest.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=begin) as pool:
        waiting = deque(pool.submit(work, item) for item in islice(remaining, ahead))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(remaining, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
