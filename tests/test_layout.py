"""The direction of imports (docs/layout.md), and what the library leaves to the command line."""

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

# What the commands call. A module or package imports only from those to its right, and from HOUSES.
COMMANDS = (
    *("inspection", "repetition", "explanation", "reproduction", "comparison", "finalization"),
    "fitting",
    *(
        "recalibration",
        "sklearn",
        "extraction",
        "importing",
        "exporting",
        "training",
        "pretraining",
        "auditing",
    ),
)
# What they do it with: a package imports only from those to its right.
HOUSES = (
    *("plots", "finetuning", "model", "evaluation", "heads", "features", "synthetic", "cohort"),
    *("runtime", "settings", "errors"),
)
ORDER = (*COMMANDS, *HOUSES)
# Inside a package a module imports only from those to its right.
INSIDE = {
    "explanation": (
        *("report", "figures", "page", "text", "explanation", "faithfulness", "curves", "scores"),
        *("findings", "maps", "wording", "subjects", "thumbnails"),
    ),
    "repetition": ("repetition", "runs", "models", "stores", "comparison", "place"),
    "pretraining": (
        *("run", "vicreg", "distillation", "trainer", "teachers"),
        *("pairs", "probe"),
    ),
    "plots": (
        *("summary", "optimism", "comparison", "reproduction", "pretraining", "learning_curves"),
        "axes",
    ),
    "finetuning": (
        *("backbones", "per_split", "out_of_fold", "loop", "fine_tuners", "gradients", "encoder"),
        "job",
        *("initial_head", "pixels", "augmentation", "curves"),
    ),
    "model": (
        *("descriptions", "loading", "ensemble", "final_model", "members", "model", "facts"),
        *(
            "folder",
            "held_out",
            "sources",
            "stored_maps",
            "scoring",
            "submission",
            "predictions",
            "familiarity",
        ),
        *("deviations", "feature_distance"),
    ),
    "evaluation": (
        *(
            "optimism",
            "protocol",
            "summary",
            "providers",
            "fusion",
            "averaging",
            "baselines",
            "regression",
            "rows",
            "scores",
            "recorded_run",
        ),
        *(
            "groups",
            "subgroups",
            "comparison",
            "run_provenance",
            "leakage",
            "hidden_truth",
            "shortcuts",
            "decision",
        ),
        *("calibration", "intervals", "metrics", "predictive_values"),
    ),
    "heads": (
        *(
            "portable",
            "engine",
            "grid",
            "blank",
            "stack",
            "distribution_head",
            "head",
            "exact_head",
        ),
        *("registry", "aggregators", "bags"),
    ),
    "heads.engine": (
        *("engine", "kept", "weighted", "reads", "ranking", "networks", "exact", "trainer"),
        *("descriptions", "logistic", "sharing", "scorers", "results", "sampling", "instances"),
    ),
    "heads.aggregators": ("networks", "ranking", "closed_forms", "weighted", "distribution"),
    "features.exchange": ("layouts", "arrays", "origin", "writers"),
    "features": (
        *("exchange", "store_writer", "map_encoder", "pipeline", "store", "hdf5", "hdf5_headers"),
        *("backbones", "conversions"),
        *("offline_weights", "shipped_weights", "views", "augmentation"),
    ),
    "synthetic": ("cohort", "signs", "rendering", "patients"),
    "cohort": (
        *(
            "image_checks",
            "image_folders",
            "fingerprints",
            "cohort",
            "groups",
            "splits",
            "fold_files",
            "attributes",
            "tables",
        ),
        *("cell_values", "csv_rows", "stains", "images", "image_statistics", "provenance"),
    ),
    "runtime": (
        *("checkpoint", "differences", "circumstances", "identity", "devices", "processes"),
        *("files", "disks", "strict_json", "progress", "saved_tensors", "arrays", "versions"),
        *("part_reader", "threads", "mapped_arrays"),
    ),
}
# Readers of stores and cohorts need no torch; nor may what they import.
WITHOUT_TORCH = (
    *("features.store", "features.store_writer", "cohort.cohort", "cohort.splits"),
    *("cohort.images", "cohort.fingerprints", "evaluation.metrics", "settings"),
)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def name_of(path: Path) -> str:
    """Return a library file's name with dots, without `lymphfeat.`; a package's is its folder's."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in files(LIBRARY)}


def imports(path: Path) -> Iterator[str]:
    """Yield every module imported anywhere in a file, as written with dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Return the library's modules that a file imports."""
    found = set()
    for name in imports(path):
        parts = name.split(".")[1:] if name.startswith("lymphfeat.") else []
        while parts and ".".join(parts) not in MODULES:
            parts = parts[:-1]
        if parts:
            found.add(".".join(parts))
    return found


def place_in(package: str, name: str) -> str | None:
    """Return which member of a package a module is, or lies in; None where it is of another."""
    prefix = f"{package}." if package else ""
    return name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else None


def members(package: str) -> set[str]:
    """Return the names of the modules and packages right inside a package."""
    found = {place_in(package, name) for name in MODULES if name not in ("", package)}
    return {name for name in found if name}


@pytest.mark.parametrize("package", ["", *INSIDE])
def test_the_order_names_every_module(package: str) -> None:
    assert members(package) == set(INSIDE.get(package, ORDER))
    assert len(INSIDE.get(package, ORDER)) == len(members(package))


def test_the_order_names_every_package() -> None:
    packages = {name_of(path) for path in MODULES.values() if path.name == "__init__.py"}
    assert {name for name in packages if members(name)} - {""} == set(INSIDE)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    """Towards the right, in the outermost package that both lie in but not in one member of."""
    for imported in own_imports(MODULES[name]):
        for package in ("", *INSIDE):
            mine, theirs = place_in(package, name), place_in(package, imported)
            if mine and theirs and mine != theirs:
                order = INSIDE.get(package, ORDER)
                assert order.index(theirs) > order.index(mine), f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_the_library_neither_prints_nor_parses(name: str) -> None:
    path = MODULES[name]
    roots = {imported.split(".")[0] for imported in imports(path)}
    assert not roots & {"click", "rich", "argparse", "lymphfeat_cli"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input", "exit", "breakpoint"), node.lineno


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_torch_in(name: str) -> None:
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        roots = {imported.split(".")[0] for imported in imports(MODULES[module])}
        assert not roots & {"torch", "timm", "torchvision"}, module
        waiting += own_imports(MODULES[module]) - seen


@pytest.mark.parametrize("path", files(CLI), ids=lambda path: path.stem)
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
        for path in files(folder)
        for name in imports(path)
    } - own
    assert {called.get(root, root) for root in roots} <= declared
