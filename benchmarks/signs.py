"""How heads compare on synthetic cohorts of challenge size, by how tumoral patients differ.

    python benchmarks/signs.py FOLDER --agg mean topk --cohorts 20
    python benchmarks/signs.py FOLDER --agg mean topk --signs variety --size-confounding 0
    python benchmarks/signs.py FOLDER --agg mean std --difficulty variety=.26 witness=.65
    python benchmarks/signs.py FOLDER --agg mean std --difficulty variety=1    # bag size alone
    python benchmarks/signs.py FOLDER --agg topk --set weight_decay=0,0.1,1

Every cohort has 163 labelled patients, 50 of them reactive, with 16 to 198 images (median 66, and
more in tumoral patients with --size-confounding). Its features are extracted once and kept in
FOLDER (0.22 GB and some minutes per cohort); its images are not kept. All heads are fitted under
the honest protocol on the same splits.

Printed for each sign: every row's mean over cohorts, and how far it is from the first head, with
the 95 % t interval over cohorts (of one cohort: the Nadeau–Bengio interval over its splits), and in
how many cohorts the Nadeau–Bengio interval of their own excludes 0 on either side.
"""

import argparse
import tempfile
from pathlib import Path
from typing import get_args

import pandas as pd

import lymphfeat as lf
from lymphfeat.evaluation.comparison import Comparison
from lymphfeat.evaluation.intervals import t_half_width
from lymphfeat.settings import ExtractSettings, FitSettings, HeadGrid, Sign, SyntheticSettings
from lymphfeat.synthetic.cohort import write_synthetic_cohort

SIGNS: tuple[Sign, ...] = get_args(Sign)


# Exact `mean` has AUC .83 under variety; under shift and witness it is neither lost nor perfect.
DIFFICULTY = {"witness": 0.65, "variety": 0.26, "shift": 0.3}


def challenge_sized(sign: Sign, seed: int, arguments: argparse.Namespace) -> SyntheticSettings:
    return SyntheticSettings(
        patients=163,
        test_patients=0,
        tumoral=113 / 163,
        images=69,
        image_range=(16, 198),
        size_confounding=arguments.size_confounding,
        sign=sign,
        difficulty=arguments.difficulty[sign],
        seed=seed,
    )


def extract_once(settings: SyntheticSettings, folder: Path, threads: int) -> Path:
    """Return the store of a cohort; render the cohort and extract its features if need be."""
    facts = (settings.sign, settings.difficulty, settings.size_confounding, settings.seed)
    path = folder / ("-".join(map(str, facts)) + ".h5")
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as images:
            root = write_synthetic_cohort(settings, Path(images) / "cohort", workers=threads)
            lf.extract(lf.Cohort.load(root), path, ExtractSettings(threads=threads))
    return path


def compare_heads(store: Path, arguments: argparse.Namespace) -> Comparison:
    settings = FitSettings(seeds=arguments.repeats, threads=arguments.threads)
    grid = HeadGrid(agg=tuple(arguments.agg), **arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        run = lf.fit_heads(store, grid, settings, Path(folder) / "run")
        assert run.folder is not None
        return lf.compare([run.folder], metric=arguments.metric)


def show(sign: str, found: list[Comparison]) -> None:
    """Print the rows of one sign, given one comparison per cohort."""
    pairs = pd.concat([each.pairs for each in found])
    means = pd.DataFrame([each.values.mean() for each in found])  # (cohorts, rows)
    reference = pairs["reference"].iloc[0]
    print(f"\n{sign}, {len(found)} cohorts, {found[0].metric}; differences from {reference}")
    print(f"  {reference:36s} {means[reference].mean():.3f}")
    for name, own in pairs.groupby("name", sort=False):
        differences = own["difference"].to_numpy(float)
        half = t_half_width(differences)
        low, high = differences.mean() - half, differences.mean() + half
        if len(own) == 1:
            low, high = own["low"].iloc[0], own["high"].iloc[0]
        better, worse = int((own["low"] > 0).sum()), int((own["high"] < 0).sum())
        print(
            f"  {name:36s} {means[name].mean():.3f}  {differences.mean():+.3f} "
            f"({low:+.3f} to {high:+.3f}); above in {better} cohorts, below in {worse}"
        )


def _named_number(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def _values(text: str) -> tuple[str, tuple[str | float, ...]]:
    """Read values of a setting of `HeadGrid`."""
    name, _, values = text.partition("=")
    return name, tuple(_number_or_text(value) for value in values.split(","))


def _number_or_text(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where stores are kept")
    parser.add_argument("--agg", nargs="+", required=True, help="heads, as of fit-head")
    parser.add_argument("--signs", nargs="+", default=SIGNS, choices=SIGNS)
    parser.add_argument("--cohorts", type=int, default=20)
    parser.add_argument("--difficulty", nargs="+", type=_named_number, default=[])
    parser.add_argument("--set", nargs="+", type=_values, default=[], help="name=value,value")
    parser.add_argument("--size-confounding", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5, help="of 5-fold cross-validation")
    parser.add_argument("--metric", default="auc")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.difficulty = DIFFICULTY | dict(arguments.difficulty)
    arguments.set = dict(arguments.set)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for sign in arguments.signs:
        found = []
        for seed in range(arguments.cohorts):
            settings = challenge_sized(sign, seed, arguments)
            store = extract_once(settings, arguments.folder, arguments.threads)
            found.append(compare_heads(store, arguments))
            print(f"{sign}, cohort {seed + 1} of {arguments.cohorts}", flush=True)
        show(sign, found)


if __name__ == "__main__":
    main()
