"""Work shared out over threads, its results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def map_in_order(
    work: Callable[[Item], Made],
    items: Sequence[Item],
    *,
    threads: int,
    together: int = 64,
    name: str,
    begin: Callable[[], object] | None = None,
) -> Iterator[Made]:
    """Yield what some brief work makes of each item, in order; the results may all wait in memory.

    Some at a time are handed to a thread, as handing over takes longer than brief work.
    """
    parts = [items[start : start + together] for start in range(0, len(items), together)]
    made = in_order(
        lambda part: [work(item) for item in part],
        parts,
        threads=threads,
        ahead=len(parts),
        name=name,
        begin=begin,
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
    stream that is abandoned, or fails, does not work on the rest. With 0 threads, the caller works.
    """
    if threads == 0:
        yield from map(work, items)
        return
    remaining = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=begin) as pool:
        waiting = deque(pool.submit(work, item) for item in islice(remaining, ahead))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(remaining, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
