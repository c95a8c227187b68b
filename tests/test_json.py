"""What `--json` prints: strict JSON, as docs/json describes it; and every JSON file written."""

import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from lymphfeat.runtime.strict_json import json_text
from lymphfeat_cli.main import COMMANDS, cli
from tests.tiny import SIDE, write_red_cohort

pytestmark = pytest.mark.seconds

SCHEMAS = Path(__file__).parent.parent / "docs" / "json"
DEVICE = ["--threads", "1", "--device", "cpu", "--precision", "float32"]
BACKBONE = ["--backbone", "test_efficientnet", "--crop", str(SIDE)]
FEW = ["--store", "store.h5", "--agg", "mean", "--folds", "3", "--epochs", "2", *DEVICE]
TRAIN = ["endtoend", "--cohort", "red", *BACKBONE, "--batch-size", "4", "--epochs", "1", *DEVICE]
TRUTH = ["--truth", "red/truth.csv"]  # of one patient without a label: an AUC is not known
PRETRAIN = ["--view-size", "32", "--field", str(SIDE), "--epochs", "1", "--batch-size", "4"]
LINES = {
    "audit": ["audit", "--cohort", "red", "--out", "audit.json"],
    "synth": ["synth", "--out", "made-up", "--patients", "4", "--test-patients", "2"],
    "a plate": ["synth", "--plate", "plate.png"],
    "pretrain": ["pretrain", "red", *BACKBONE[:2], *PRETRAIN, "--out", "w.safetensors", *DEVICE],
    "extract": ["extract", "--cohort", "red", *BACKBONE, "--out", "store.h5", *DEVICE],
    "one seed of both protocols": ["fit-head", *FEW, "--protocol", "both", "--seeds", "1"],
    "honest": ["fit-head", *FEW, "--seeds", "1", *TRUTH, "--out", "honest"],
    "wards": ["extract", "--cohort", "wards", *BACKBONE, "--out", "wards.h5", *DEVICE],
    "by group": [
        *("fit-head", "--store", "wards.h5", "--agg", "mean", "--groups", "ward", *DEVICE),
        *("--out", "groups"),
    ],
    "report": ["fit-head", *FEW, "--protocol", "report", "--seeds", "2", "--out", "report"],
    "compare, one split": ["compare", "runs/mean-both/report", "--out", "one.png"],
    "compare": ["compare", "honest", "--metric", "log_loss"],
    "endtoend": [*TRAIN, "--validation", "0.4", "--out", "model", *TRUTH],
    "fused members": [
        *("endtoend", "--cohort", "made-up", *BACKBONE, "--epochs", "1", *DEVICE),
        *("--folds", "2", "--fusion", "late", "--out", "fused"),
    ],
    "a fused model": ["info", "fused"],
    "members": [*TRAIN, "--folds", "2", "--out", "members"],
    "export": ["export", "store.h5", "--format", "torchmil", "--out", "bags"],
    "import": ["import", "bags", "--out", "imported.h5"],
    "predict": ["predict", "--cohort", "red", "--model", "model", *DEVICE, *TRUTH],
    "rerun": ["rerun", "honest"],
    "rerun of a store": ["rerun", "store.h5", "--cohort", "red"],
    "finalize": ["finalize", "honest", "--out", "final"],
    "predict by a final model": [
        "predict",
        "--cohort",
        "red",
        "--model",
        "final",
        *DEVICE,
        "--force",
    ],
    "one patient": [
        *("predict", "--images", "red/P1", "--age", "50", "--model", "final", *DEVICE, "--force"),
        *("--allow-missing-attributes", "--prevalence", "0.3", "--abstain", "--alpha", "0.6"),
    ],
    "recalibrate": ["recalibrate", "--cohort", "other", "--model", "final", *DEVICE],
    "a final model": ["info", "final"],
    "explain": ["explain", "--cohort", "red", "--model", "model", "--plates", "0", *DEVICE, *TRUTH],
    "one image": ["explain", "--image", "red/P1/0.png", "--model", "model", *DEVICE],
    "a store": ["info", "store.h5"],
    "a run": ["info", "honest"],
    "a run of one split": ["info", "runs/mean-both/report"],
    "a model": ["info", "model"],
    "k-fold members": ["info", "members"],
    "weights": ["info", "w.safetensors"],
    "shipped weights": ["info", "bloodcells"],
    "reproduce": [
        *("reproduce", "report", "--cohort", "large", "--backbone", "resnet18", *DEVICE),
        *("--weights", "none", "--seeds", "1", "--folds", "3", "--epochs", "1"),
    ],
}


def strict(text: str) -> Any:
    """Read JSON, and fail on what Python alone takes for it."""

    def refuse(constant: str) -> None:
        pytest.fail(f"bare {constant}")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run every line in one folder, each on what those before it have made."""
    root: Path = tmp_path_factory.mktemp("json")
    found = {"": str(root)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("LYMPHFEAT_CACHE", "cache")
        write_red_cohort(Path("red"), "0101010101?", truth=True)
        write_red_cohort(Path("other"), "01" * 6 + "?", seed=1, prefix="Q")
        table = write_red_cohort(Path("wards"), "01" * 9) / "cohort.csv"
        ward = ["ward", *(f"{number // 2 % 3}" for number in range(18))]
        lines = zip(table.read_text().splitlines(), ward, strict=True)
        table.write_text("".join(f"{line},{own}\n" for line, own in lines))
        write_red_cohort(Path("large"), "01" * 6 + "?", side=112)
        for name, line in LINES.items():
            result = CliRunner().invoke(cli, [*line, "--json"])
            assert result.exit_code == 0, (name, result.output, result.exception)
            found[name] = result.stdout
    return found


def validator(command: str) -> Draft202012Validator:
    schema = strict((SCHEMAS / f"{command}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", LINES)
def test_results_are_as_the_docs_describe_them(printed: dict[str, str], name: str) -> None:
    validator(LINES[name][0]).validate(strict(printed[name]))


def test_what_is_not_known_is_null(printed: dict[str, str]) -> None:
    assert strict(printed["predict"])["truth"]["hidden_auc"] is None
    assert strict(printed["one seed of both protocols"])["report"][0]["ba_low"] is None
    assert strict(printed["compare, one split"])["pairs"][0]["p"] is None


def test_every_command_is_described_and_tried() -> None:
    assert {path.name for path in SCHEMAS.glob("*.json")} == {f"{c}.schema.json" for c in COMMANDS}
    assert {line[0] for line in LINES.values()} == set(COMMANDS)


def test_every_json_file_is_strict(printed: dict[str, str]) -> None:
    files = list(Path(printed[""]).rglob("*.json"))
    for path in files:
        strict(path.read_text(encoding="utf-8"))
    assert {path.name for path in files} >= {
        *("audit.json", "config.json", "summary.json", "splits.json", "provenance.json"),
        *("model.json", "members.json", "final.json", "export.json", "training.json"),
    }


def test_a_share_above_1_or_a_field_that_is_not_described_is_found(
    printed: dict[str, str],
) -> None:
    told = strict(printed["honest"])
    check = validator("fit-head")
    assert check.is_valid(told)
    row = told["summary"][0]
    for name, value in (("ba_high", 1.2), ("auc_low", -0.1), ("kind", "odd"), ("novel", 1)):
        assert not check.is_valid(told | {"summary": [row | {name: value}]}), name
    assert not check.is_valid(told | {"novel": 1})


def test_values_that_json_lacks() -> None:
    values = {
        "nan": [math.nan, np.nan, np.float32("inf"), -math.inf],
        "numpy": {"a": np.array([[1.5, np.nan]]), "b": np.int64(3), "c": np.bool_(True)},
        "path": Path("a") / "b",
        "day": date(2021, 1, 2),
        "tuple": (1, None, "ä"),
        4: True,
    }
    assert strict(json_text(values)) == {
        "nan": [None] * 4,
        "numpy": {"a": [[1.5, None]], "b": 3, "c": True},
        "path": str(Path("a") / "b"),
        "day": "2021-01-02",
        "tuple": [1, None, "ä"],
        "4": True,
    }
    with pytest.raises(TypeError, match="set"):
        json_text({"a": {1}})
