"""Every command that writes, on inputs so small that each takes a second or less.

They run in a folder beside `inputs` and write to `out`, by relative paths: the same words, the same
bytes, wherever that is.
"""

from dataclasses import dataclass
from pathlib import Path

from tests.forks import Forks
from tests.tiny import write_red_cohort

_MACHINE = ("--device", "cpu", "--threads", "1", "--precision", "float32")
_TINY = ("--backbone", "test_efficientnet", "--crop", "64", "--weights", "none", *_MACHINE)
_COHORT = ("--cohort", "../inputs/red")
_EXTRACT = ("extract", *_COHORT, *_TINY, "--batch-size", "4")
_HEADS = ("--agg", "std", "--agg", "topk", "--agg", "attention", "--width", "4", "--epochs", "2")
_FIT = ("fit-head", "--seeds", "1", "--folds", "3", *_MACHINE)
_ENDTOEND = ("endtoend", *_COHORT, *_TINY, "--batch-size", "4", "--lr", "0.003", "--epochs", "3")
_STORE = ("--store", "../inputs/store.h5")


@dataclass(frozen=True)
class Command:
    """A command: its words, the options by which its result is another one, and what it writes."""

    words: tuple[str, ...]
    other: tuple[str, ...]
    out: str = "out/result"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Its words with its output."""
        return (*self.words, "--out", self.out)


# Those that take long, and must go on where they were killed.
RESUMING = {
    "extract": Command(_EXTRACT, ("--seed", "1"), "out/s.h5"),
    "extract, fine-tuned": Command(
        (*_EXTRACT, "--finetune-epochs", "2", "--splits", "kfold:2", "--finetune-lr", "0.003"),
        ("--seed", "1"),
        "out/s.h5",
    ),
    "fit-head": Command((*_FIT, *_STORE, *_HEADS, "--save"), ("--seed", "1")),
    "fit-head, both": Command(
        (*_FIT, *_STORE, *_HEADS[:4], "--epochs", "10", "--protocol", "both"), ("--seed", "1")
    ),
    "fit-head, model": Command(
        (*_FIT, *_STORE, *_HEADS, "--model-out", "out/model"), ("--seed", "1")
    ),
    "endtoend": Command(_ENDTOEND, ("--seed", "1")),
    "endtoend, folds": Command((*_ENDTOEND, "--folds", "2"), ("--seed", "1")),
    "endtoend, fused": Command(
        (*_ENDTOEND, "--folds", "2", "--fusion", "late", "--attributes", "age"), ("--seed", "1")
    ),
    "pretrain": Command(
        (
            *("pretrain", "../inputs/red", "--backbone", "test_efficientnet", "--init", "none"),
            *("--epochs", "2", "--batch-size", "4", "--view-size", "32", "--field", "64"),
            *_MACHINE,
        ),
        ("--seed", "1"),
        "out/w.safetensors",
    ),
    "finalize": Command(("finalize", "../inputs/run", "--row", "std"), ("--row", "top10")),
}
# Those that are soon done.
OTHERS = {
    "audit": Command(("audit", *_COHORT), ("--crop", "80"), "out/a.json"),
    "import": Command(("import", "../inputs/bags"), ("--backbone", "b"), "out/s.h5"),
    "export": Command(
        ("export", "../inputs/store.h5", "--format", "torchmil"), ("--format", "npz")
    ),
    "compare": Command(("compare", "../inputs/run"), ("--metric", "auc"), "out/c.png"),
    "reproduce": Command(
        (
            *("reproduce", "report", *_COHORT, "--backbone", "resnet18", "--weights", "none"),
            *("--seeds", "1", "--folds", "3", "--epochs", "1", *_MACHINE),
        ),
        ("--seed", "1"),
    ),
    "predict": Command(
        (
            *("predict", "--model", "../inputs/final", *_STORE, "--images-out", "out/i.csv"),
            *("--submission", "out/s.csv"),
        ),
        ("--prevalence", "0.1"),
        "out/p.csv",
    ),
    "recalibrate": Command(
        ("recalibrate", "--model", "../inputs/final", "--store", "../inputs/there.h5"),
        ("--prevalence", "0.1"),
    ),
    "explain": Command(
        ("explain", "--model", "../inputs/model", *_COHORT, *_MACHINE, "--plates", "1"),
        ("--plates", "2"),
        "out/r.html",
    ),
    "explain, one image": Command(
        ("explain", "--model", "../inputs/model", "--image", "../inputs/red/P1/0.png", *_MACHINE),
        ("--image", "../inputs/red/P2/0.png"),
        "out/c.png",
    ),
    "rerun": Command(("rerun", "../inputs/run"), ()),
    "rerun, store": Command(("rerun", "../inputs/store.h5", *_COHORT), (), "out/s.h5"),
    "rerun, model": Command(("rerun", "../inputs/model", *_COHORT), ()),
    "synth": Command(
        ("synth", "--patients", "4", "--test-patients", "1", "--images", "2"), ("--seed", "1")
    ),
}
WRITING = RESUMING | OTHERS


def write_inputs(folder: Path, forks: Forks, *, for_all: bool = True) -> None:
    """Write what the commands read to the folder `inputs`: cohorts, stores, a run and models.

    Without `for_all` only what those that resume need.
    """
    inputs = folder / "inputs"
    _write_cohort(inputs / "red", "01" * 6 + "??", seed=0, prefix="P")
    (folder / "out").mkdir(parents=True)
    steps = [
        (*_EXTRACT, "--out", "inputs/store.h5"),
        (*_FIT, "--store", "inputs/store.h5", *_HEADS, "--out", "inputs/run"),
    ]
    if for_all:
        _write_cohort(inputs / "there", "01" * 6, seed=7, prefix="T")
        steps += [
            (*_EXTRACT, "--cohort", "inputs/there", "--out", "inputs/there.h5"),
            (*_ENDTOEND, "--out", "inputs/model"),
            ("finalize", "inputs/run", "--row", "std", "--out", "inputs/final"),
            ("export", "inputs/store.h5", "--format", "torchmil", "--out", "inputs/bags"),
        ]
    for words in steps:
        # From `folder` itself, so that the run names its store as those of a folder beside it do.
        done = forks.start(folder / "out", [_from_out(word) for word in words])
        assert done.wait() == 0, done.stderr


def _from_out(word: str) -> str:
    return f"../{word}" if word.startswith("inputs/") else word


def _write_cohort(root: Path, labels: str, *, seed: int, prefix: str) -> None:
    write_red_cohort(root, labels, side=112, seed=seed, prefix=prefix)
    head, *rows = (root / "cohort.csv").read_text(encoding="utf-8").splitlines()
    aged = [f"{head},age", *(f"{row},{30 + 7 * n % 50}" for n, row in enumerate(rows))]
    (root / "cohort.csv").write_text("\n".join(aged) + "\n", encoding="utf-8")
