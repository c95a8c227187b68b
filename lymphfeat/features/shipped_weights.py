"""The weights inside the package: versions of `bloodcells`, all of a ResNet-18."""

from pathlib import Path

SHIPPED = "bloodcells"  # the version that is the default
SHIPPED_FOR = "resnet18"
_VERSIONS = {
    SHIPPED: "bloodcells-v2",
    **{version: version for version in ("bloodcells-v1", "bloodcells-v2")},
}
_FOLDER = Path(__file__).parent / "weights"


def find_shipped_weights(name: str) -> Path | None:
    """Return the file of shipped weights; None if none are called that."""
    version = _VERSIONS.get(name)
    return None if version is None else _FOLDER / f"{version}.safetensors"
