"""The processes that torchrun started and their exchanges; with one process, these do nothing.

Tensors are exchanged by gloo in main memory and by NCCL between GPUs.
"""

import atexit
import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def is_started_alone() -> bool:
    """Return whether torchrun has started no other process beside this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def join_processes() -> None:
    """Join the processes of torchrun until this one ends; with one process, do nothing.

    Processes that leave and join again would find each other's old addresses.
    """
    if is_started_alone() or _together():
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    atexit.register(distributed.destroy_process_group)


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return this process's number; 0 when it is the only one."""
    return distributed.get_rank() if _together() else 0


def count() -> int:
    """Return how many processes work together."""
    return distributed.get_world_size() if _together() else 1


def is_first() -> bool:
    """Return whether this process is the one that writes and shows results."""
    return rank() == 0


def from_first(value: T) -> T:
    """Return the value of the first process."""
    if count() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def to_first(value: T) -> list[T]:
    """Return the values of all processes to the first one, an empty list to the others."""
    if count() == 1:
        return [value]
    values: list[Any] | None = [None] * count() if is_first() else None
    distributed.gather_object(value, values)
    return values or []


def share(rows: Tensor) -> Tensor:
    """Return this process's part of rows; the parts are as equal as possible and in order."""
    return rows.tensor_split(count())[rank()]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, n: int) -> Tensor:
        sizes = [len(part) for part in torch.empty(n, 0).tensor_split(count())]
        ctx.start = sum(sizes[: rank()])
        ctx.size = sizes[rank()]
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Every process has the whole loss, so the gradient of its own rows is complete, too.
        return gradients[0][ctx.start : ctx.start + ctx.size].contiguous(), None


def gather_rows(own: Tensor, n: int) -> Tensor:
    """Gather the parts that `share` made of n rows on every process; differentiable.

    If every process computes the loss of all rows, each gets the gradient with respect to its own
    part: the gradient with respect to the parameters is the sum over processes.
    """
    gathered: Tensor = own if count() == 1 else _Gather.apply(own, n)
    return gathered


def one_voice(values: Tensor) -> Tensor:
    """Count values that every process computes identically once in sums of gradients."""
    n = count()
    return values if n == 1 else values / n + (values - values / n).detach()


def add_gradients(parameters: Iterable[Tensor], *, mean: bool = False) -> None:
    """Replace gradients by their sum, or mean, over all processes."""
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    if mean:
        flat /= count()
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


def summed(values: Tensor) -> Tensor:
    """Return the sum of values over all processes; differentiable."""
    total: Tensor = values if count() == 1 else _Sum.apply(values)
    return total
