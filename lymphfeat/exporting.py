"""Exporting: a store's features as bags in the formats of other tools."""

import os
from dataclasses import dataclass
from pathlib import Path

from lymphfeat.errors import SettingsError
from lymphfeat.features.exchange.origin import IMAGES_FILE, ORIGIN_FILE, write_origin
from lymphfeat.features.exchange.writers import FORMATS, TABLE_FILE, write_table
from lymphfeat.features.store import FROZEN, FeatureStore
from lymphfeat.runtime.disks import require_room
from lymphfeat.runtime.files import ResultKind, files_in, result_folder
from lymphfeat.settings import ExportFormat, require

EXPORT = ResultKind(
    name="set of bags",
    marks=(ORIGIN_FILE,),
    files=(
        *(ORIGIN_FILE, IMAGES_FILE, TABLE_FILE),
        *(pattern for format in FORMATS.values() for pattern in format.files),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Export:
    """A folder of exported bags, and what is in it."""

    folder: Path
    format: ExportFormat
    features: str  # the set of features
    patients: int
    images: int
    channels: int

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files in the folder."""
        return files_in(self.folder)


def export_bags(
    store: FeatureStore | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: ExportFormat,
    *,
    features: str = "",
    force: bool = False,
) -> Export:
    """Write the average-pooled features of a store to the folder `out`.

    - clam: h5_files/<id>.h5 (features, coords), pt_files/<id>.pt and dataset.csv.
    - torchmil: features/<id>.npy and labels/<id>.npy.
    - anndata: features.h5ad, an observation per image.
    - npz: <id>.npz (features, label).

    All also have patients.csv (labels, splits, attributes), and say where the features come from
    and whose labels their backbone has seen, for `import_bags`. Features are float32, of the
    identity view; `features` names the set, by default the frozen one. Raises SettingsError for an
    unknown format, or if the store has several sets and none is named.

    >>> lf.export_bags("cache/features.h5", "bags", "torchmil").files
    """
    require(format in FORMATS, f"format (={format}) must be one of {', '.join(FORMATS)}.")
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    name = features or _only_set(opened)
    pooled = opened.pooled(name)  # raises StoreError for an unknown name
    with result_folder(Path(out), EXPORT, force=force) as folder:
        require_room(folder, FORMATS[format].copies * pooled[:, 0].nbytes)
        FORMATS[format].write(opened, name, folder)
        write_table(opened, folder)
        write_origin(opened, opened.feature_sets[name], format, folder)
    return Export(
        folder=Path(out),
        format=format,
        features=name,
        patients=len(opened.ids),
        images=len(opened.image_names),
        channels=opened.shape.channels,
    )


def _only_set(store: FeatureStore) -> str:
    names = list(store.feature_sets)
    if FROZEN in names:
        return FROZEN
    if len(names) > 1:
        raise SettingsError(
            f"features must name one of the sets of {store.path}: {', '.join(names)}; got none. "
            "Choose one with --features."
        )
    return names[0]
