"""Two processes under torchrun (gloo) against one: the same weights, bytes, and one message."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.extraction import extract
from lymphfeat.finetuning.job import hold_out, prepare
from lymphfeat.finetuning.loop import decode, make_fine_tuner
from lymphfeat.runtime.files import unfinished_folder
from lymphfeat.runtime.processes import is_first
from lymphfeat.settings import EndToEndSettings, ExtractSettings, HeadSettings
from lymphfeat.training import train
from tests.tiny import BACKBONE, tiny_settings, write_red_cohort

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EXTRACT = {
    precision: ExtractSettings(
        backbone=BACKBONE, precision=precision, device="cpu", threads=1, batch_size=4
    )
    for precision in ("float32", "bfloat16")
}

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "subset": ("bnsigmoid", {"gradient": "subset"}),
    "exact": ("bnsigmoid", {"gradient": "exact"}),
    "frozen": ("mean", {"gradient": "exact", "frozen_batchnorm": True}),
    "ranking": ("topk", {}),
    "network": ("gated-attention", {"gradient": "exact", "frozen_batchnorm": True}),
    "solved": ("mean+std", {"gradient": "exact", "frozen_batchnorm": True}),
}

SCRIPT = """
import sys
from pathlib import Path
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.training import train
from lymphfeat.extraction import extract
from tests.test_distributed import EXTRACT, WAYS, same_chunks, settings_of, take_a_step
cohort, out = Cohort.load(sys.argv[1]), Path(sys.argv[2])
train(cohort, out / "m", settings_of("frozen", processes=2))
for way in WAYS:
    take_a_step(cohort, settings_of(way, processes=2), out / f"{way}.safetensors")
take_a_step(cohort, same_chunks(processes=2), out / "same chunks.safetensors")
for precision, settings in EXTRACT.items():
    extract(cohort, out / f"{precision}.h5", settings)
"""


def settings_of(way: str, *, processes: int) -> EndToEndSettings:
    """Return settings whose sizes, which are each process's, make the same global batch."""
    agg, changes = WAYS[way]
    return tiny_settings(
        head=HeadSettings(agg=agg, lr=1e-4),
        max_forward_size=4 // processes,
        max_backward_size=6 // processes,
        **changes,
    )


def same_chunks(*, processes: int) -> EndToEndSettings:
    """Return settings in bfloat16 whose chunks are of the same images in one process or more."""
    settings = settings_of("frozen", processes=2)
    assert settings.max_backward_size == 3
    return replace(settings, precision="bfloat16", max_backward_size=3)


def take_a_step(cohort: Cohort, settings: EndToEndSettings, path: Path) -> None:
    """Write the gradients of an epoch of one step, and the statistics after it."""
    everybody = replace(settings, batch_size=len(cohort.ids))
    job = prepare(cohort, hold_out(cohort, everybody), everybody)
    tuner = make_fine_tuner(job, decode(cohort, everybody))
    tuner.prepare_head()
    tuner.run_epoch()
    parts = {"backbone": tuner.backbone, "head": tuner.head}
    tensors = {
        f"{part} {name}": values.contiguous()
        for part, module in parts.items()
        for name, values in [
            *((name, p.grad) for name, p in module.named_parameters() if p.grad is not None),
            *module.named_buffers(),
        ]
    }
    if is_first():
        save_file(tensors, path)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path_factory.mktemp("red")))


@pytest.fixture(scope="module")
def together(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together")
    (out / "script.py").write_text(SCRIPT)
    line = [*TORCHRUN, str(out / "script.py"), str(cohort.root), str(out)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("way", WAYS)
def test_a_step_together_is_the_step_of_one_process(
    way: str, cohort: Cohort, together: Path, tmp_path: Path
) -> None:
    take_a_step(cohort, settings_of(way, processes=1), tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")
    two = load_file(together / f"{way}.safetensors")
    assert set(one) == set(two)
    scale = max(float(values.abs().max()) for name, values in one.items() if "running" not in name)
    assert scale > 1e-3
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5 * scale)


def test_a_step_in_bfloat16_together_is_the_step_of_one_process(
    cohort: Cohort, together: Path, tmp_path: Path
) -> None:
    """Of the same chunks every rounding to bfloat16 is the same; their sum is float32's."""
    take_a_step(cohort, same_chunks(processes=1), tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")
    two = load_file(together / "same chunks.safetensors")
    exact = load_file(together / "frozen.safetensors")
    assert set(one) == set(two)
    assert any(not torch.equal(values, exact[name]) for name, values in one.items())
    scale = max(float(values.abs().max()) for name, values in one.items() if "running" not in name)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6 * scale)


def test_training_together_gives_the_weights_of_one_process(
    cohort: Cohort, together: Path, tmp_path: Path
) -> None:
    # Batch-norm frozen: else some gradients are zero but for rounding, and Adam makes it steps.
    train(cohort, tmp_path / "m", settings_of("frozen", processes=1))
    one, two = (load_file(path / "m" / "model.safetensors") for path in (tmp_path, together))
    torch.testing.assert_close(two, one, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("precision", EXTRACT)
def test_extracting_together_gives_the_same_bytes(
    precision: str, cohort: Cohort, together: Path, tmp_path: Path
) -> None:
    alone = extract(cohort, tmp_path / "s.h5", EXTRACT[precision])
    assert (together / f"{precision}.h5").read_bytes() == alone.path.read_bytes()


def command(cohort: Path, out: Path, *arguments: str) -> list[str]:
    backbone = ["--backbone", BACKBONE.backbone, "--crop", str(BACKBONE.crop), "--device", "cpu"]
    line = ["-m", "lymphfeat_cli", "endtoend", "--cohort", str(cohort), "--out", str(out)]
    return [*TORCHRUN, *line, *backbone, "--precision", "float32", *arguments]


def test_an_error_ends_the_job_with_its_message(cohort: Cohort, tmp_path: Path) -> None:
    line = command(cohort.root, tmp_path / "m", "--agg", "nose")
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Error: agg (=nose) must be one of" in done.stderr


def test_a_process_that_dies_ends_the_job(cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "m"
    line = command(cohort.root, out, "--epochs", "100000")
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(line, env=ENVIRONMENT, stderr=log, stdout=log)
    deadline = time.monotonic() + 120
    while not (unfinished_folder(out) / "checkpoint.pt").exists():
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    workers = [
        pid for pid in children if b"lymphfeat_cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert job.wait(timeout=120) != 0
    told = (tmp_path / "log").read_text()
    assert re.search(r"exitcode *: -9|Signal 9 \(SIGKILL\)", told), told
