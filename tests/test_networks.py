"""Networks on ragged bags against one bag at a time, and their training against plain PyTorch."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from lymphfeat.cohort.splits import Split, report_splits
from lymphfeat.errors import SettingsError
from lymphfeat.heads.aggregators.networks import LSTM, Attention
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.blank import empty_head
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit, FittedHeads, split_generator
from lymphfeat.heads.engine.sampling import Sampler, Sampling
from lymphfeat.heads.grid import require_trainable, resolve
from lymphfeat.heads.registry import AGGREGATORS, NetworkAggregator
from lymphfeat.heads.stack import NetworkHead
from lymphfeat.runtime.devices import cpu_threads
from lymphfeat.settings import HeadSettings

NETWORKS = [name for name, row in AGGREGATORS.items() if isinstance(row, NetworkAggregator)]
SIZES = [3, 1, 7, 4, 12, 2, 5, 9, 1, 6]
BOUNDS = np.cumsum([0, *SIZES])
CHANNELS = 6
LABELS = np.array([0, 1] * 5, np.int64)
IDS = [f"P{i}" for i in range(len(SIZES))]


def settings_of(agg: str, **more: object) -> HeadSettings:
    return resolve(HeadSettings(agg=agg, width=8, layers=1, lr=0.01, **more))  # type: ignore[arg-type]


def head_of(settings: HeadSettings, seed: int = 0) -> NetworkHead:
    mean, scale = torch.linspace(-1, 1, CHANNELS), torch.linspace(0.5, 2, CHANNELS)
    generator = torch.Generator().manual_seed(seed)
    return NetworkHead.initial(settings, mean, scale, generator).eval()


def images_of(n: int = int(BOUNDS[-1]), seed: int = 0) -> Tensor:
    return torch.randn(n, CHANNELS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("agg", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_a_patient_scores_the_same_alone(agg: str, training: bool) -> None:
    head, images = head_of(settings_of(agg)).train(training), images_of()
    together = head(images, Bags.of(SIZES))
    parts = torch.split(images, SIZES)
    alone = torch.cat([head(part, Bags.of([len(part)])) for part in parts])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("agg", [name for name in NETWORKS if name != "lstm"])
def test_order_of_images_says_nothing(agg: str) -> None:
    head, images = head_of(settings_of(agg)), images_of(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    bags = Bags.of([8])
    torch.testing.assert_close(head(images, bags), head(images[order], bags))


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), layers=st.integers(1, 3))
def test_an_lstm_reads_padded_bags_as_packed_ones(sizes: list[int], layers: int) -> None:
    network = head_of(replace(settings_of("lstm"), layers=layers)).network
    assert isinstance(network, LSTM)
    images, bags = images_of(sum(sizes)).requires_grad_(), Bags.of(sizes)
    learnt = [images, *network.recurrent.parameters()]
    by_size, packed = network._read(images, bags), network._read_packed(images, bags)
    torch.testing.assert_close(by_size, packed)
    gradients = [torch.autograd.grad(states.square().sum(), learnt) for states in (by_size, packed)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(network._read(images, bags), packed)


@pytest.mark.parametrize("agg", ["attention", "gated-attention"])
def test_attention_is_the_paper(agg: str) -> None:
    """Ilse et al. 2018, equations 7 to 9, image after image."""
    head = head_of(settings_of(agg))
    network, images = head.network, images_of(5)
    assert isinstance(network, Attention)
    inputs = (images - head.mean) * head.scale
    powers = []
    for h in inputs:
        hidden = torch.tanh(network.hidden.weight @ h + network.hidden.bias)
        if network.gate is not None:
            hidden = hidden * torch.sigmoid(network.gate.weight @ h + network.gate.bias)
        powers.append(torch.exp((network.attention.weight @ hidden)[0]))
    assert (network.gate is not None) == (agg == "gated-attention")
    z = sum(power * h for power, h in zip(powers, inputs, strict=True)) / sum(powers)
    expected = network.classifier.weight @ z + network.classifier.bias
    torch.testing.assert_close(head(images, Bags.of([5])), expected)
    weights = network.weights(inputs, Bags.of([2, 3]))
    torch.testing.assert_close(Bags.of([2, 3]).sum(weights), torch.ones(2, 1))


@pytest.mark.parametrize("agg", NETWORKS)
def test_initialisation_is_the_generators_alone(agg: str) -> None:
    before = torch.get_rng_state()
    one, two, other = (head_of(settings_of(agg), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features() -> Features:
    rng = np.random.default_rng(0)
    maps = rng.normal(1, 2, (BOUNDS[-1], 4, CHANNELS, 1, 1)).astype(np.float16)
    maps[..., 2, :, :] = 3.0  # a channel that never varies
    return Features(maps, maps[..., 0, 0].astype(np.float32), BOUNDS, IDS, LABELS)


def one_after_another(
    features: Features, head: HeadSettings, split: Split, sampling: Sampling, epochs: int
) -> NDArray[np.float32]:
    """Train a network with a plain loop, one bag at a time; its final probabilities (P,)."""
    train = features.rows_of(split.train)
    images = torch.cat([features.images[BOUNDS[p] : BOUNDS[p + 1]] for p in sorted(train)])
    std, mean = torch.std_mean(images, dim=0, correction=0)
    scale = torch.where(std > 1e-6, 1 / std, 0.0)
    network = NetworkHead.initial(head, mean, scale, split_generator(split))
    optimizer = torch.optim.Adam(
        network.parameters(), lr=head.lr, weight_decay=head.weight_decay, foreach=False
    )
    instances = features.of_unit("image")
    sampler = Sampler(train, instances, sampling, split_generator(split))
    tumoral = LABELS[train].mean()
    counts = {"none": [1.0, 1.0], "balanced": [0.5 / (1 - tumoral), 0.5 / tumoral]}
    for _ in range(epochs):
        for batch in sampler.epoch():
            drawn = batch.images
            if drawn is None:
                rows = [torch.arange(BOUNDS[p], BOUNDS[p + 1]) for p in batch.patients.tolist()]
            else:
                rows = list(torch.split(drawn, batch.sizes.tolist()))
            views = batch.views if batch.views is not None else torch.zeros(sum(map(len, rows)))
            flat = instances.source.gather(torch.cat(rows), views.long())[:, 0]
            losses = []
            bags = torch.split(flat, [len(row) for row in rows])
            for bag, patient in zip(bags, batch.patients.tolist(), strict=True):
                logit = network(bag, Bags.of([len(bag)]))[0]
                label = torch.tensor(float(LABELS[patient]))
                loss = nn.functional.binary_cross_entropy_with_logits(logit, label)
                losses.append(loss * counts[head.class_weights][int(label)])
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(losses).mean())
            optimizer.step()
    with torch.no_grad():
        logits = [
            network(features.images[a:b], Bags.of([int(b - a)]))[0] for a, b in pairwise(BOUNDS)
        ]
    return np.asarray(torch.stack(logits).sigmoid().numpy())


@pytest.mark.parametrize("agg", NETWORKS)
@pytest.mark.parametrize(
    ("head", "sampling"),
    [
        ({"weight_decay": 0.1}, Sampling(batch_size=2)),
        (
            {"class_weights": "balanced"},
            Sampling(batch_size=3, images_per_patient=3, views=4),
        ),
    ],
    ids=["all images", "drawn"],
)
def test_engine_trains_what_a_plain_loop_trains(
    features: Features, agg: str, head: dict[str, object], sampling: Sampling
) -> None:
    (split,) = report_splits(IDS, LABELS, seeds=1)
    settings = settings_of(agg, **head)
    slow = one_after_another(features, settings, split, sampling, epochs=3)
    fitted = fit_stacked(
        features,
        [Fit(head=settings, split=split, curve="nobody")],
        epochs=3,
        sampling=sampling,
    )
    assert np.isnan(fitted.curves[0, :2]).all()
    np.testing.assert_allclose(fitted.curves[0, -1], slow, atol=1e-4)


def test_fitting_together_is_fitting_alone(features: Features) -> None:
    heads = [settings_of(agg) for agg in (*NETWORKS, "topk", "bnsigmoid")]
    fits = [Fit(head=head, split=s) for head in heads for s in report_splits(IDS, LABELS, seeds=2)]
    call = partial(fit_stacked, features, epochs=2, sampling=Sampling(batch_size=2))
    together = call(fits)
    for i, fit in enumerate(fits):
        alone = call([fit])
        np.testing.assert_allclose(together.curves[i], alone.curves[0], atol=1e-5)
        np.testing.assert_allclose(together.losses[i], alone.losses[0], atol=1e-5)


@pytest.mark.parametrize("agg", ["attention", "topk", "bnsigmoid"])
def test_fitting_on_threads_is_fitting_on_one(features: Features, agg: str) -> None:
    heads = [settings_of(agg), replace(settings_of(agg), lr=0.01)]
    splits = report_splits(IDS, LABELS, seeds=2)
    fits = [Fit(head=head, split=split) for head in heads for split in splits]
    told: list[tuple[int, int]] = []

    def fit(threads: int) -> FittedHeads:
        with cpu_threads(threads):
            found = fit_stacked(
                features,
                fits,
                epochs=3,
                sampling=Sampling(batch_size=2),
                progress=lambda done, total, text="": told.append((done, total)),
            )
            assert torch.get_num_threads() == threads
        return found

    one, told_by_one = fit(1), told.copy()
    told.clear()
    three = fit(3)
    assert told[-1] == told_by_one[-1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    np.testing.assert_allclose(three.curves, one.curves, atol=1e-5)
    np.testing.assert_allclose(three.losses, one.losses, atol=1e-5)


def test_what_one_thread_raises_ends_the_others(features: Features) -> None:
    fits = [Fit(head=settings_of("topk"), split=s) for s in report_splits(IDS, LABELS, seeds=2)]
    reports: list[int] = []

    def stop(done: int, total: int, text: str = "") -> None:
        reports.append(done)
        if done:
            raise OSError("the disk is full")

    with cpu_threads(2):
        with pytest.raises(OSError, match="the disk is full"):
            fit_stacked(features, fits, epochs=1000, sampling=Sampling(batch_size=2), progress=stop)
        assert torch.get_num_threads() == 2
    assert len(reports) == 2  # at the start, and once


def test_an_image_scores_as_a_patient_who_has_nothing_else(features: Features) -> None:
    split = report_splits(IDS, LABELS, seeds=1)[0]
    fits = [Fit(head=settings_of(agg), split=split) for agg in ("attention", "mean")]
    fitted = fit_stacked(features, fits, epochs=1, sampling=Sampling(batch_size=2))
    single = SIZES.index(1)
    image = [features.images[BOUNDS[single] : BOUNDS[single] + 1, None]]
    for i in range(2):
        probability = 1 / (1 + np.exp(-fitted.image_logits(i, image)))
        np.testing.assert_allclose(probability, fitted.curves[i, -1, [single]], rtol=1e-4)


def test_what_no_training_through_a_backbone_supports() -> None:
    with pytest.raises(SettingsError, match=r"class_weights \(=balanced\) must be none here"):
        require_trainable(settings_of("topk", class_weights="balanced"))
    with pytest.raises(SettingsError, match=r"agg \(=mean@2\+std\) must not name a store after @"):
        require_trainable(settings_of("mean@2+std"))
    for agg in ("topk", "mean+std", "lstm"):
        require_trainable(settings_of(agg))


@pytest.mark.parametrize("agg", NETWORKS)
def test_a_network_reads_out_as_it_predicts(agg: str) -> None:
    head = head_of(resolve(HeadSettings(agg=agg, width=8)))
    generator = torch.Generator().manual_seed(1)
    bags = Bags.of([3, 1, 5])
    pixels = torch.randn(9, 4, CHANNELS, generator=generator)
    read = head.read_out(head.keep(pixels), bags)
    with torch.no_grad():
        expected = head(pixels.mean(1), bags)
    torch.testing.assert_close(read.total, expected)
    torch.testing.assert_close(read.probability, expected.sigmoid())
    torch.testing.assert_close(bags.sum(read.weight[:, None])[:, 0], torch.ones(3))
    if "attention" in agg:
        torch.testing.assert_close(bags.sum(read.contribution[:, None])[:, 0], expected)


@pytest.mark.parametrize("agg", [*NETWORKS, "topk", "mean", "std", "mean+std@1"])
def test_a_blank_head_is_filled_by_what_another_has_learnt(agg: str) -> None:
    settings = resolve(HeadSettings(agg=agg, width=8))
    full, other = empty_head(settings, CHANNELS), empty_head(settings, CHANNELS)
    generator = torch.Generator().manual_seed(0)
    learnt = {
        name: 0.5 + torch.rand(value.shape, generator=generator).to(value.dtype)
        for name, value in full.state_dict().items()
    }
    full.load_state_dict(learnt)
    instances, bags = torch.randn(4, 1, CHANNELS, generator=generator), Bags.of([4])
    expected = full.read_out(full.keep(instances), bags).total
    assert float(other.read_out(other.keep(instances), bags).total) != float(expected)
    other.load_state_dict(full.state_dict())
    torch.testing.assert_close(other.read_out(other.keep(instances), bags).total, expected)
