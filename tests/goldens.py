"""Results of each version, kept in tests/data, and how they were written.

A version's folder has a cohort and what the commands made of it: `weights.safetensors`, `model`,
`members`, `run` and `final`. Their backbone is a timm model of 8,000 parameters, so that they are
small. Neither it nor the folders may ever change; a version that writes another format adds one.
"""

import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from PIL import Image
from timm.models import ResNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.synthetic.cohort import MANIFEST
from lymphfeat_cli.main import cli

DATA = Path(__file__).parent / "data"
VERSIONS = sorted(path.name for path in DATA.glob("v*"))
SIDE = 112
BACKBONE = ["--backbone", "lymphfeat_golden"]
MACHINE = ["--device", "cpu", "--threads", "1", "--precision", "float32", "-q"]
default_cfgs = generate_default_cfgs({"lymphfeat_golden": {}})  # where timm looks for it


@register_model
def lymphfeat_golden(pretrained: bool = False, **options: Any) -> ResNet:
    """Make the backbone; importing this module makes its name known to timm."""
    options |= {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16)}
    options |= {"stem_type": "deep", "stem_width": 4}
    model: ResNet = build_model_with_cfg(ResNet, "lymphfeat_golden", pretrained, **options)
    return model


def run(line: str, *more: str) -> Result:
    """Run a command, which must succeed: its words in one string, then others as they are."""
    result = CliRunner().invoke(cli, [*line.split(), *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def write_goldens(folder: Path) -> None:
    """Write a version's folder: once, and never again."""
    folder.mkdir()
    with chdir(folder):  # so that no path of this machine is in them
        run("synth --patients 10 --test-patients 2 --images 2 --seed 3 --out cohort -q")
        _simplify(Path("cohort"))
        for path in Path("cohort").rglob("*.jpg"):
            _crop(path)
        few = "--epochs 2 --batch-size 8 --field 112"
        run(f"pretrain cohort {few} --out weights.safetensors", *BACKBONE, *MACHINE)
        given = ["--cohort", "cohort", "--weights", "weights.safetensors", *BACKBONE, *MACHINE]
        learning = "--epochs 30 --lr 0.003 --head-lr 0.1 --batch-size 4"
        run(f"endtoend {learning} --validation 0.3 --agg topk --k-agg 2 --out model", *given)
        run(f"endtoend {learning} --folds 2 --tta --out members", *given)
        run("extract --out features.h5", *given)
        heads = "--agg topk --agg bnsigmoid --agg attention --width 4 --fusion late"
        splits = "--seeds 2 --folds 3 --epochs 4"
        run(f"fit-head --store features.h5 {heads} {splits} --save --out run", *MACHINE)
        _write_final()
        Path("features.h5").unlink()
        for path in Path().rglob("*.png"):
            Image.new("L", (1, 1)).save(path)


def _write_final() -> None:
    """Write a final model of two heads, averaged and fused, and what it predicts."""
    heads = "--agg mean+std --agg topk --k-agg 2 --fusion late"
    splits = "--seeds 1 --folds 3 --epochs 4"
    run(f"fit-head --store features.h5 {heads} {splits} --out heads", *MACHINE)
    row = ["--row", "average of 2 heads + clinical (late)"]
    weights = ["--weights", "weights.safetensors"]
    run("finalize heads --members --out final -q", *row, *weights)
    files = "--out final/predictions.csv --images-out final/images.csv"
    run(f"predict --model final --cohort cohort {files}", *MACHINE)
    shutil.rmtree("heads")


def _simplify(cohort: Path) -> None:
    """Turn a synthetic cohort into one table and an image folder per patient.

    Nothing kept here should look like tables or dates of real patients.
    """
    table = Cohort.load(cohort).table
    columns = ["label", "gender", "age", "lymph_count"]
    table[columns].to_csv(cohort / "patients.csv", float_format="%.4g", lineterminator="\n")
    for folder in ("trainset", "testset"):
        for images in sorted(path for path in (cohort / folder).iterdir() if path.is_dir()):
            images.rename(cohort / images.name)
        shutil.rmtree(cohort / folder)
    for name in ("clinical_annotation.csv", "sample_submission.csv", "truth.csv", MANIFEST):
        (cohort / name).unlink()


def _crop(path: Path) -> None:
    """Keep the middle of an image: the part that a model sees."""
    with Image.open(path) as image:
        x, y = ((size - SIDE) // 2 for size in image.size)
        image.crop((x, y, x + SIDE, y + SIDE)).save(path, quality=85)
