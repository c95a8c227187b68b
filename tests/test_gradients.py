"""Gradients in bounded memory against one plain backward pass over everything."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lymphfeat.cohort.images import NORMALIZATIONS
from lymphfeat.features.backbones import Backbone, build_backbone
from lymphfeat.finetuning.augmentation import draw_views, flip_each, unaltered
from lymphfeat.finetuning.encoder import (
    CommonBatchNorm,
    Encoder,
    batchnorms,
    share_statistics,
    statistics_kept,
)
from lymphfeat.finetuning.fine_tuners import Bag, PatientLoss, SelectedLoss
from lymphfeat.finetuning.gradients import backpropagate, exact_gradient, subset_gradient
from lymphfeat.finetuning.pixels import ImageBatch, PixelCache, as_they_are
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.engine.exact import solve_head
from lymphfeat.heads.grid import resolve
from lymphfeat.heads.head import Head
from lymphfeat.heads.registry import (
    AGGREGATORS,
    DistributionAggregator,
    NetworkAggregator,
    WeightedAggregator,
    find_aggregator,
)
from lymphfeat.heads.stack import HeadStack, NetworkHead
from lymphfeat.settings import EndToEndSettings, Gradient, HeadSettings, Unit

CPU = torch.device("cpu")
# All that may change a view: the passes of the exact gradient must see the same ones.
ALTERED = EndToEndSettings(colour_jitter=0.1, affine=0.1)
SIZES = torch.tensor([1, 7, 4])
N = 12
LABELS = torch.tensor([1.0, 0.0, 1.0])
WEIGHTED = [name for name, row in AGGREGATORS.items() if isinstance(row, WeightedAggregator)]
DISTRIBUTION = [
    name for name, row in AGGREGATORS.items() if isinstance(row, DistributionAggregator)
]
NETWORKS = [name for name, row in AGGREGATORS.items() if isinstance(row, NetworkAggregator)]


class Setting:
    """A tiny backbone with batch-norm that has seen data, a head, and twelve images of noise."""

    def __init__(self, agg: str = "bnsigmoid", unit: Unit = "pixel", frozen: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (N, 3, 64, 64)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        cache = PixelCache(pixels, NORMALIZATIONS["imagenet"], CPU)
        self.backbone, _ = build_backbone("test_efficientnet", image_size=64)
        self.encoder = Encoder(self.backbone, cache, unit=unit, frozen_batchnorm=frozen)
        with torch.no_grad():
            Encoder(self.backbone, cache, unit=unit)(
                as_they_are(torch.arange(N))
            )  # statistics worth freezing
        settings = resolve(HeadSettings(agg=agg, unit=unit, prototypes=2, width=8))
        self.head = self._make_head(settings, generator).train()
        self.order = torch.randperm(N, generator=generator)
        self.batch = ImageBatch(rows=self.order, views=draw_views(N, ALTERED, generator))
        bag = Bag(rows=torch.arange(N), sizes=SIZES)
        self.loss_of = PatientLoss(self.head, bag, self.order, LABELS, CPU)

    def _make_head(self, settings: HeadSettings, generator: torch.Generator) -> Head:
        if isinstance(find_aggregator(settings), DistributionAggregator):
            images = as_they_are(torch.arange(N))
            empty = DistributionHead.empty(settings, self.backbone.channels)
            instances = self.encoder.score(empty, images, N)
            return DistributionHead(solve_head(settings, instances, SIZES.numpy(), LABELS.long()))
        if isinstance(find_aggregator(settings), NetworkAggregator):
            zeros = torch.zeros(self.backbone.channels)
            head = NetworkHead.initial(settings, zeros, zeros.clone(), generator)
            pooled = self.encoder.score(head, as_they_are(torch.arange(N)), N)  # (N, 1, C)
            head.standardise(pooled[:, 0])
            return head
        weight = torch.randn(1, self.backbone.channels, generator=generator)
        return HeadStack([settings], weight, torch.zeros(1))

    def gradients(self) -> dict[str, Tensor]:
        """Return and clear the gradients of all parameters that have one."""
        named = [*self.backbone.named_parameters(), *self.head.named_parameters()]
        found = {name: p.grad.clone() for name, p in named if p.grad is not None}
        for _, parameter in named:
            parameter.grad = None
        return found

    def statistics(self) -> list[Tensor]:
        return [b.clone() for layer in batchnorms(self.backbone) for b in layer.buffers()]


def one_shot(setting: Setting, detached: slice | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Do it the plain way: all instances in one graph, patients one after the other."""
    instances = setting.encoder(setting.batch)  # (n, U, C)
    if detached is not None:
        keep = torch.ones(N, 1, 1)
        keep[detached] = 0
        instances = keep * instances + (1 - keep) * instances.detach()
    by_image: list[Tensor] = [torch.empty(0)] * N
    for place, image in enumerate(setting.order.tolist()):
        by_image[image] = instances[place]
    logit = setting.head.patient_logits(setting.head.keep(torch.stack(by_image)), Bags.of(SIZES))
    terms = [-torch.log(p if y else 1 - p) for p, y in zip(logit.sigmoid(), LABELS, strict=True)]
    loss = torch.stack(terms).mean()
    torch.autograd.backward(loss)
    return loss.detach(), setting.gradients()


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = tolerance * max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=atol)


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the times that the host asks a device for a number, and waits for all it is doing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_waits_are_counted() -> None:
    with Waits() as waits:
        assert int(torch.tensor([1, 2]).sum()) == 3
    assert waits.count == 1


@pytest.mark.parametrize("unit", ["pixel", "image"])
@pytest.mark.parametrize("agg", WEIGHTED)
def test_the_loss_of_a_step_waits_for_no_device(agg: str, unit: Unit) -> None:
    setting = Setting(agg, unit)
    instances = setting.encoder(setting.batch)  # (n, U, C)
    bag = Bag(rows=torch.arange(N), sizes=SIZES)
    pixels = torch.zeros(N, dtype=torch.int64)
    with Waits() as waits:
        bags_loss = PatientLoss(setting.head, bag, setting.order, LABELS, CPU)
        torch.autograd.backward(bags_loss(instances))
        selected = SelectedLoss(setting.head, bag, setting.order, pixels, LABELS, CPU)
        selected(instances.detach())
    assert waits.count == 0


@pytest.mark.seconds
@pytest.mark.parametrize("unit", ["pixel", "image"])
@pytest.mark.parametrize("agg", [*WEIGHTED, *DISTRIBUTION, *NETWORKS])
def test_exact_is_the_one_shot_gradient(agg: str, unit: Unit) -> None:
    setting = Setting(agg, unit)
    loss = exact_gradient(setting.encoder, setting.batch, setting.loss_of, chunk_size=5)
    got = setting.gradients()
    expected_loss, expected = one_shot(setting)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    # Standardising by the spread over three patients enlarges the rounding of features.
    assert_close(got, expected, 1e-5 if agg in WEIGHTED else 1e-3)


def test_exact_with_batchnorm_by_chunks() -> None:
    setting = Setting(frozen=False)
    before = setting.statistics()
    chunks = setting.batch.chunks(5)
    loss = setting.loss_of(torch.cat([setting.encoder(chunk) for chunk in chunks]))
    torch.autograd.backward(loss)
    expected, expected_statistics = setting.gradients(), setting.statistics()
    for buffer, value in zip(
        (b for layer in batchnorms(setting.backbone) for b in layer.buffers()), before, strict=True
    ):
        buffer.copy_(value)
    exact_gradient(setting.encoder, setting.batch, setting.loss_of, chunk_size=5)
    assert_close(setting.gradients(), expected)
    torch.testing.assert_close(setting.statistics(), expected_statistics)


@pytest.mark.seconds
@pytest.mark.parametrize("agg", NETWORKS)
def test_a_subset_of_all_is_exact(agg: str) -> None:
    setting = Setting(agg, "")
    subset_gradient(
        setting.encoder, setting.batch, setting.loss_of, max_forward_size=4, max_backward_size=N
    )
    got = setting.gradients()
    exact_gradient(setting.encoder, setting.batch, setting.loss_of, chunk_size=5)
    assert_close(got, setting.gradients(), 1e-3)


@pytest.mark.parametrize("chosen", [1, 5, 12, 50])
def test_subset_detaches_all_but_the_first(chosen: int) -> None:
    setting = Setting()
    subset_gradient(
        setting.encoder,
        setting.batch,
        setting.loss_of,
        max_forward_size=4,
        max_backward_size=chosen,
    )
    got = setting.gradients()
    _, expected = one_shot(setting, detached=slice(chosen, None))
    assert_close(got, expected)
    _, whole = one_shot(setting)
    for name in ("weight", "bias", "gamma", "beta"):  # scorer and aggregator learn from all images
        torch.testing.assert_close(got[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batchnorm_of_the_chunks_without_gradients(mode: str) -> None:
    setting, other = Setting(frozen=False), Setting(frozen=False)
    subset_gradient(
        setting.encoder,
        setting.batch,
        setting.loss_of,
        max_forward_size=4,
        max_backward_size=6,
        no_grad_batchnorm=mode,
    )
    if mode == "train":
        for chunk in other.batch.rest(6).chunks(4):
            other.encoder(chunk)
    other.encoder(other.batch.first(6))
    torch.testing.assert_close(setting.statistics(), other.statistics())


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    setting = Setting(frozen=True)
    before = setting.statistics()
    backpropagate(setting.encoder, setting.batch, setting.loss_of, EndToEndSettings())
    torch.testing.assert_close(setting.statistics(), before, rtol=0, atol=0)


@pytest.mark.parametrize("gradient", ["subset", "exact"])
def test_no_more_images_at_a_time_than_allowed(
    gradient: Gradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting()
    seen: list[tuple[bool, int]] = []
    plain = Encoder.__call__

    def spy(encoder: Encoder, batch: ImageBatch, *, batchnorm_training: bool = True) -> Tensor:
        seen.append((torch.is_grad_enabled(), len(batch)))
        return plain(encoder, batch, batchnorm_training=batchnorm_training)

    monkeypatch.setattr(Encoder, "__call__", spy)
    settings = EndToEndSettings(gradient=gradient, max_forward_size=3, max_backward_size=4)
    backpropagate(setting.encoder, setting.batch, setting.loss_of, settings)
    assert max(n for with_gradient, n in seen if with_gradient) <= 4
    assert sum(n for with_gradient, n in seen if with_gradient) == (
        4 if gradient == "subset" else N
    )
    assert max(n for with_gradient, n in seen if not with_gradient) <= 4


@pytest.mark.parametrize("unit", ["pixel", "image"])
def test_selected_instances_reference(unit: Unit) -> None:
    setting = Setting("topk", unit)
    bag = Bag(rows=torch.arange(5), sizes=torch.tensor([1, 1, 3]))
    order = torch.tensor([4, 0, 3, 1, 2])
    generator = torch.Generator().manual_seed(0)
    per_image = 4 if unit == "pixel" else 1
    instances = torch.randn(5, per_image, setting.backbone.channels, generator=generator)
    pixels = torch.tensor([3, 0, 1, 2, 0]) % per_image
    loss = SelectedLoss(setting.head, bag, order, pixels, LABELS, CPU)(instances).detach()
    logits = setting.head.keep(instances).detach()[:, :, 0].tolist()
    of_image = {
        image: logits[place][pixel]
        for place, (image, pixel) in enumerate(zip(order.tolist(), pixels.tolist(), strict=True))
    }
    means = [of_image[0], of_image[1], (of_image[2] + of_image[3] + of_image[4]) / 3]
    terms = [math.log1p(math.exp(sign * m)) for sign, m in zip((-1, 1, -1), means, strict=True)]
    assert float(loss) == pytest.approx(sum(terms) / 3, rel=1e-5)


class Pooling(Backbone):
    """A backbone that commutes with flips: channels averaged over 8×8 squares."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.channels = 3

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 8)


def test_a_pixel_keeps_its_number_when_flipped() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)
    cache = PixelCache(pixels, NORMALIZATIONS["imagenet"], CPU)
    flips = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    encoder = Encoder(Pooling(), cache, unit="pixel")
    plain = as_they_are(torch.arange(4))
    flipped = replace(plain, views=replace(plain.views, flips=flips))
    torch.testing.assert_close(encoder(flipped), encoder(plain))
    assert not torch.equal(cache.load(flipped), cache.load(plain))


def test_flips_one_by_one() -> None:
    images = torch.arange(2 * 3 * 2 * 3).reshape(2, 3, 2, 3)
    flipped = flip_each(images, torch.tensor([[True, False], [True, True]]))
    assert torch.equal(flipped[0], images[0].flip(-1))
    assert torch.equal(flipped[1], images[1].flip(-1, -2))


@given(n=st.integers(0, 40), size=st.integers(1, 15))
def test_chunks_are_equal_ordered_and_bounded(n: int, size: int) -> None:
    chunks = as_they_are(torch.arange(n)).chunks(size)
    assert [row for chunk in chunks for row in chunk.rows.tolist()] == list(range(n))
    lengths = [len(chunk) for chunk in chunks]
    assert not n or (max(lengths) <= size and max(lengths) - min(lengths) <= 1)


def test_statistics_kept_also_when_it_fails() -> None:
    setting = Setting(frozen=False)
    before = setting.statistics()
    with pytest.raises(IndexError), statistics_kept(setting.backbone):
        setting.encoder(ImageBatch(rows=torch.tensor([0, 1, N]), views=unaltered(3)))
    torch.testing.assert_close(setting.statistics(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_shared_statistics_are_batch_norms_own_in_one_process(name: str) -> None:
    plain, _ = build_backbone(name, image_size=64)  # its batch-norm layers are timm's, and torch's
    shared, _ = build_backbone(name, image_size=64)
    parameters = list(shared.parameters())
    share_statistics(shared)
    assert {type(layer) for layer in batchnorms(shared)} == {CommonBatchNorm}
    assert list(shared.state_dict()) == list(plain.state_dict())
    assert [id(p) for p in shared.parameters()] == [id(p) for p in parameters]
    images = torch.randn(4, 3, 64, 64)
    for training in (True, False):  # evaluation follows the statistics of the training
        expected, found = plain.train(training)(images), shared.train(training)(images)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shared.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
