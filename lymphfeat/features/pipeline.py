"""Image files through a backbone, batch after batch, with every core at work."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch

from lymphfeat.cohort.images import Crop
from lymphfeat.runtime.devices import work_alone
from lymphfeat.runtime.threads import in_order

Encoded = TypeVar("Encoded")
PIECE = 32  # images that a thread encodes at a time: more take memory, and hardly less time
_AHEAD = 4  # batches decoded before a GPU wants them


def encode_files(
    batches: Sequence[Sequence[Path]],
    decode: Callable[[Path], Crop],
    encode: Callable[[Sequence[Crop]], Encoded],
    *,
    device: torch.device,
    threads: int,
) -> Iterator[Encoded]:
    """Yield what `encode` makes of the decoded files of every batch, in order.

    On a CPU every thread takes a batch and decodes and encodes it alone: cores never wait for one
    another, as they do several times in each layer when they share a batch, and sums do not depend
    on how many there are. For a GPU all threads decode. Call it within `cpu_threads`, which gives
    torch its threads back.
    """
    if device.type == "cpu":
        yield from in_order(
            lambda batch: encode([decode(path) for path in batch]),
            batches,
            threads=threads,
            ahead=threads + 1,
            name="encode",
            begin=work_alone,
        )
        return
    ahead = _AHEAD * max(map(len, batches), default=1)
    paths = chain.from_iterable(batches)
    crops = in_order(decode, paths, threads=threads, ahead=ahead, name="decode")
    for batch in batches:
        yield encode([next(crops) for _ in batch])
