"""How large a page of many patients gets, and how fast it opens in headless Chromium.

python benchmarks/explain_page.py --model MODEL --cohort DIR [--patients 200] [--images 100]
The cohort's photographs are dealt out again to as many patients as wanted; scores are made up.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from playwright.sync_api import sync_playwright

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import stream_crops
from lymphfeat.explanation.explanation import Explanation
from lymphfeat.explanation.page import BUDGET, render_page
from lymphfeat.explanation.scores import decide
from lymphfeat.explanation.subjects import Subject, subject_of
from lymphfeat.explanation.thumbnails import SheetMaker, Thumbnails
from lymphfeat.model.model import Model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cohort", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--images", type=int, default=100)
    options = parser.parse_args()
    explanation = deal_out(options.model, options.cohort, options.patients, options.images)
    begun = time.perf_counter()
    page = render_page(explanation)  # its pictures are made already
    made = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        file.write_text(page, encoding="utf-8")
        measured = {
            "megabytes": file.stat().st_size / 1e6,
            "within_budget": file.stat().st_size <= BUDGET,
            "seconds_to_make": made,
            **open_page(file),
        }
    print(json.dumps(measured, indent=2))


def deal_out(model_folder: Path, root: Path, patients: int, images: int) -> Explanation:
    """Make an explanation of this many patients from a cohort's photographs and random scores."""
    known = Cohort.load(root)
    paths = cycle([path for paths in known.images for path in paths])
    table = pd.DataFrame(
        {"label": [i % 2 for i in range(patients)], "split": "train"},
        index=pd.Index([f"P{i}" for i in range(patients)], name="id"),
    )
    cohort = replace(
        known,
        table=table,
        images=tuple(tuple(islice(paths, images)) for _ in range(patients)),
        submission_ids=(),
    )
    subject = subject_of(Model.load(model_folder), table)
    rng = np.random.default_rng(0)
    maps = rng.normal(0, 2, (patients * images, 4, 4)).astype(np.float32)
    kept = torch.from_numpy(maps.mean((1, 2)))[:, None, None]
    decisions = decide(subject, [kept], cohort.n_images)
    return Explanation(
        subject=subject,
        cohort=cohort,
        maps=maps,
        decisions=decisions,
        predicted=decisions.probability,
        thumbnails=draw(subject, cohort),
        deletion=None,
    )


def draw(subject: Subject, cohort: Cohort) -> Thumbnails:
    """Make the pictures, which `explain` does while it scores."""
    sheets = SheetMaker(cohort, subject.crop, BUDGET * 4 // 5)
    paths = [path for own in cohort.images for path in own]
    for crop in stream_crops(paths, subject.crop):
        sheets.add([crop.pixels])
    return sheets.made()


def open_page(file: Path) -> dict[str, object]:
    """Open the page three times from disk, and its first patient: seconds, the middle of three."""
    opened, patient = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for _ in range(3):
            tab = browser.new_page()
            begun = time.perf_counter()
            tab.goto(file.as_uri())
            tab.wait_for_selector("html[data-ready]")
            opened.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            tab.click("#patients tbody tr a >> nth=0")
            tab.wait_for_selector("#plate .tile")
            patient.append(time.perf_counter() - begun)
            tab.close()
        browser.close()
    return {
        "seconds_to_open": sorted(opened)[1],
        "seconds_to_open_a_patient": sorted(patient)[1],
        "browser": "chromium, headless",
    }


if __name__ == "__main__":
    main()
