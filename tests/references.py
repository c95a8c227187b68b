"""Slow, obvious versions of what the library does fast: one bag, one head, plain Python."""

import math
from collections.abc import Sequence
from fractions import Fraction

Bag = Sequence[float]  # one patient's logits


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def effective_k(n: int, k: int, percent: str | None = None, minimum: int = 1) -> int:
    if percent is None:
        return min(n, k)
    return min(n, max(minimum, math.ceil(Fraction(percent) * n / 100)))


def ranked(bag: Bag) -> list[int]:
    """Instances from the highest logit to the lowest, ties in instance order."""
    return sorted(range(len(bag)), key=lambda i: (-bag[i], i))


def selected(bag: Bag, k: int, bottom: bool = False) -> list[int]:
    order = ranked(bag)
    chosen = set(order[:k])
    if bottom:
        chosen |= set(order[len(order) - k :])
    return sorted(chosen)


def ranking_probability(bag: Bag, k: int, bottom: bool = False, reduce: str = "mean") -> float:
    probabilities = [sigmoid(bag[i]) for i in selected(bag, k, bottom)]
    return max(probabilities) if reduce == "max" else sum(probabilities) / len(probabilities)


def mean_logit(bag: Bag) -> float:
    return sum(bag) / len(bag)


def max_logit(bag: Bag) -> float:
    return max(bag)


def lse_logit(bag: Bag, temperature: float) -> float:
    return math.log(sum(math.exp(temperature * x) for x in bag) / len(bag)) / temperature


def moments(bags: Sequence[Bag]) -> tuple[float, float]:
    values = [x for bag in bags for x in bag]
    mean = sum(values) / len(values)
    return mean, sum((x - mean) ** 2 for x in values) / len(values)


def bnsigmoid_weights(
    bag: Bag, mean: float, variance: float, gamma: float = 1.0, beta: float = 0.0
) -> list[float]:
    raw = [sigmoid(beta + gamma * (x - mean) / math.sqrt(variance + 1e-5)) for x in bag]
    return [value / sum(raw) for value in raw]


def bnsigmoid_logit(
    bag: Bag, mean: float, variance: float, gamma: float = 1.0, beta: float = 0.0
) -> float:
    weights = bnsigmoid_weights(bag, mean, variance, gamma, beta)
    return sum(w * x for w, x in zip(weights, bag, strict=True))
