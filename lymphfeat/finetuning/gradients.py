"""One backward pass through the backbone in bounded memory (METHOD §3): gradient subset, or exact.

Both take a batch in random order and a loss of all its instances, leave gradients in the parameters
and return the loss. Memory holds the activations of one chunk and the instances of the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lymphfeat.finetuning.encoder import Encoder, statistics_kept
from lymphfeat.finetuning.pixels import ImageBatch
from lymphfeat.runtime import processes
from lymphfeat.settings import EndToEndSettings

# Instances (n, U, C), in the order of the batch -> the loss, a scalar.
LossOf = Callable[[Tensor], Tensor]


def backpropagate(
    encoder: Encoder, batch: ImageBatch, loss_of: LossOf, settings: EndToEndSettings
) -> Tensor:
    """Add the gradients of a loss to the parameters, as `settings.gradient` says; return it."""
    n = processes.count()  # the sizes are per process
    if settings.gradient == "exact":
        return exact_gradient(encoder, batch, loss_of, chunk_size=n * settings.max_backward_size)
    return subset_gradient(
        encoder,
        batch,
        loss_of,
        max_forward_size=n * settings.max_forward_size,
        max_backward_size=n * settings.max_backward_size,
        no_grad_batchnorm=settings.no_grad_batchnorm,
    )


def subset_gradient(
    encoder: Encoder,
    batch: ImageBatch,
    loss_of: LossOf,
    *,
    max_forward_size: int,
    max_backward_size: int,
    no_grad_batchnorm: str = "train",
) -> Tensor:
    """Backpropagate through the first `max_backward_size` images only (report, pseudo-code 2).

    The others pass through the backbone without gradients, in chunks, with batch-norm in the mode
    `no_grad_batchnorm`; what follows the backbone sees and learns from all.
    """
    with torch.no_grad():
        others = [
            encoder(chunk, batchnorm_training=no_grad_batchnorm == "train")
            for chunk in batch.rest(max_backward_size).chunks(max_forward_size)
        ]
    chosen = encoder(batch.first(max_backward_size))
    loss = loss_of(torch.cat([chosen, *others]))
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def exact_gradient(
    encoder: Encoder, batch: ImageBatch, loss_of: LossOf, *, chunk_size: int
) -> Tensor:
    """Backpropagate through all images, chunk by chunk, in the memory of one chunk.

    All chunks pass forward without gradients; the loss gives its gradient with respect to the
    instances; each chunk passes forward once more and backpropagates its share. With frozen
    batch-norm this is the gradient of one pass over the whole batch, up to rounding; otherwise that
    of batch-norm by chunks. The backbone must be deterministic (no dropout), because both passes
    must agree.
    """
    chunks = batch.chunks(chunk_size)
    with torch.no_grad(), statistics_kept(encoder.backbone):
        instances = torch.cat([encoder(chunk) for chunk in chunks])  # (n, U, C)
    instances.requires_grad_()
    loss = loss_of(instances)
    loss.backward()  # type: ignore[no-untyped-call]
    assert instances.grad is not None
    shares = torch.split(instances.grad, [len(chunk) for chunk in chunks])
    for chunk, share in zip(chunks, shares, strict=True):
        encoder(chunk).backward(share)  # type: ignore[no-untyped-call]
    return loss.detach()
