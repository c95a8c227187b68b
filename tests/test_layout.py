"""The direction of imports (DESIGN §3), and what the library leaves to the command line."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "lymphfeat"
CLI = ROOT / "cli" / "lymphfeat_cli"

# A module imports only from rows below its own, or, in its own row, from those to its right.
LAYERS = (
    ("explain",),
    ("inspection", "demo"),
    ("reproduction", "optimism"),
    ("fit", "extract", "endtoend", "pretraining", "audit"),
    ("checkpoint",),
    ("summary_figure", "comparison_figure", "optimism_figure", "comparison", "truth"),
    ("run_provenance",),
    ("protocol", "guards", "model", "fusion", "baselines", "shortcuts"),
    ("training", "evaluation"),
    ("heads", "aggregators"),
    ("bags", "store", "backbones", "splits"),
    ("synthetic", "synthetic_patients", "smears"),
    ("cells", "identity"),
    ("cohort", "tables", "rows", "attributes", "clinical"),
    (
        "images",
        "axes",
        "intervals",
        "decision",
        "calibration",
        "metrics",
        "settings",
        "compute",
        "processes",
        "augmentation",
    ),
    ("progress", "provenance", "files", "errors", "strict_json"),
)
ORDER = {name: place for place, name in enumerate(name for row in LAYERS for name in row)}
# What a package's modules import of each other, by the same rule.
ENDTOEND = (
    *("run", "members", "finetuning", "folder", "submission", "fitting", "training", "gradients"),
    *("job", "initial", "curves", "encoder", "pixels", "views", "baselines"),
)


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Yield every module imported anywhere in a file, as written with dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit(path: Path) -> str:
    """Return the module or package of the library that a file belongs to."""
    return path.relative_to(LIBRARY).with_suffix("").parts[0]


def test_the_order_names_every_module() -> None:
    assert {unit(path) for path in modules(LIBRARY)} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("path", modules(LIBRARY), ids=lambda path: path.stem)
def test_imports_point_down(path: Path) -> None:
    if path.parent == LIBRARY and path.stem == "__init__":
        assert not [name for name in imports(path) if name.startswith("lymphfeat")]
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "lymphfeat" or parts[1] not in ORDER or parts[1] == unit(path):
            continue
        assert ORDER[parts[1]] > ORDER[unit(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("name", ENDTOEND)
def test_imports_point_down_within_endtoend(name: str) -> None:
    for imported in imports(LIBRARY / "endtoend" / f"{name}.py"):
        parts = imported.split(".")
        if parts[:2] == ["lymphfeat", "endtoend"]:
            assert ENDTOEND.index(parts[2]) > ENDTOEND.index(name), f"{name} imports {imported}"


def test_the_order_names_every_module_of_endtoend() -> None:
    assert {p.stem for p in modules(LIBRARY / "endtoend")} - {"__init__"} == set(ENDTOEND)


@pytest.mark.parametrize("path", modules(LIBRARY), ids=lambda path: path.stem)
def test_the_library_neither_prints_nor_parses(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"click", "rich", "argparse", "lymphfeat_cli"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input", "exit", "breakpoint"), node.lineno


@pytest.mark.parametrize("path", [*modules(LIBRARY), *modules(CLI)], ids=lambda path: path.stem)
def test_json_is_strict(path: Path) -> None:
    """Python's own writer has NaN for what is not known: no JSON. Two modules say allow_nan."""
    if path.relative_to(ROOT).as_posix() not in (
        "lymphfeat/strict_json.py",
        "lymphfeat/explain/page.py",
    ):
        assert not re.search(
            r"json\.dumps?\(|\.to_json\(.*orient", path.read_text(encoding="utf-8")
        )


@pytest.mark.parametrize("name", ["store", "cohort", "splits", "images", "metrics", "settings"])
def test_no_torch_in(name: str) -> None:
    """Readers of stores and cohorts need no torch; nor may what they import."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for imported in imports(LIBRARY / f"{module}.py"):
            assert imported.split(".")[0] not in ("torch", "timm", "torchvision"), module
            parts = imported.split(".")
            if parts[0] == "lymphfeat" and parts[1] in ORDER and parts[1] not in seen:
                waiting.append(parts[1])


@pytest.mark.parametrize("path", modules(CLI), ids=lambda path: path.stem)
def test_commands_import_nothing_heavy_at_the_top(path: Path) -> None:
    light = {"click", "rich", "lymphfeat", "lymphfeat_cli"} | sys.stdlib_module_names
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        assert {name.split(".")[0] for name in names} <= light, path.name


def test_every_package_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["pretrain"]]
    declared = {re.split(r"[^\w-]", line)[0] for line in wanted}
    called = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where module and package differ
    own = {"lymphfeat", "lymphfeat_cli"} | sys.stdlib_module_names
    roots = {
        name.split(".")[0]
        for folder in (LIBRARY, CLI)
        for path in modules(folder)
        for name in imports(path)
    } - own
    assert {called.get(root, root) for root in roots} <= declared
