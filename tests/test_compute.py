"""What memory there is: the machine's, less what control groups take away."""

from pathlib import Path

import pytest
import torch

from lymphfeat.runtime.devices import available_memory

CPU = torch.device("cpu")
MIB = 2**20


def write_group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    if stat:
        (folder / "memory.stat").write_text(stat)


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    ("folder", "names", "limit", "used", "stat", "left"),
    [
        (".", V2, "100", 70, "", 30),
        (".", V2, "100", 70, "anon 20\nactive_file 10\ninactive_file 40\nfile 50\n", 70),
        (".", V2, "100", 170, "", 0),  # the limit was lowered
        ("memory", V1, "100", 70, "", 30),
        ("memory", V1, "100", 70, "inactive_file 1\ntotal_inactive_file 40\n", 70),
    ],
)
def test_what_a_group_uses_is_not_free(
    tmp_path: Path,
    folder: str,
    names: tuple[str, str],
    limit: str,
    used: int,
    stat: str,
    left: int,
) -> None:
    write_group(tmp_path / folder, names, limit, used, stat)
    if folder == ".":
        assert available_memory(CPU, groups=tmp_path) == left
        return
    group = own_group("memory")
    write_group(tmp_path / folder / group, names, limit, used, stat)
    assert available_memory(CPU, groups=tmp_path) == left


def own_group(controllers: str) -> str:
    """Return the path of this process's group; skip where it is in none."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, found, path = line.split(":", 2)
        if found == controllers:
            return path.lstrip("/")
    pytest.skip(f"no control group of {controllers or 'version 2'}")


@pytest.mark.parametrize(("controllers", "names"), [("", V2), ("memory", V1)])
def test_the_tightest_of_nested_groups_counts(
    tmp_path: Path, controllers: str, names: tuple[str, str]
) -> None:
    inner = tmp_path / controllers / own_group(controllers)
    write_group(inner, names, "100", 10, "")
    assert available_memory(CPU, groups=tmp_path) == 90
    write_group(tmp_path / controllers, names, "100", 60, "")
    outer_only = 90 if inner == tmp_path / controllers else 40
    assert available_memory(CPU, groups=tmp_path) == min(outer_only, 40)


def test_no_limit_leaves_the_machine_s_memory(tmp_path: Path) -> None:
    free = available_memory(CPU, groups=tmp_path / "none")
    assert free > 64 * MIB
    write_group(tmp_path, V2, "max", 70, "")
    unlimited = available_memory(CPU, groups=tmp_path)
    assert abs(unlimited - free) < free / 2  # it varies by itself
