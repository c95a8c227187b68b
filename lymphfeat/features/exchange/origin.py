"""What an exported folder says of itself, so that importing it again loses nothing.

`export.json` names the backbone and whose labels and images its weights have seen; `images.csv` has
a line per row of the bags, with the image's name and hash, by which patients are recognised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lymphfeat.cohort.provenance import NOBODY, Provenance
from lymphfeat.errors import StoreError
from lymphfeat.features.store import FeatureSet, FeatureStore
from lymphfeat.runtime.strict_json import json_text, parse_json

ORIGIN_FILE, IMAGES_FILE = "export.json", "images.csv"
FORMAT = "lymphfeat-export"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where bags come from."""

    backbone: str
    weights_sha256: str = ""
    provenance: Provenance = NOBODY
    images: Mapping[str, pd.DataFrame] | None = None  # by patient: image, hash

    def names_of(self, id: str, rows: int) -> Sequence[str] | None:
        """Return the names of a patient's images; None where they are not known."""
        return None if self.images is None else list(self._images_of(id, rows)["image"])

    def hashes_of(self, id: str, rows: int) -> Sequence[str] | None:
        """Return the hashes of a patient's image files; None where they are not known."""
        if self.images is None:
            return None
        hashes = list(self._images_of(id, rows)["hash"])
        return hashes if all(hashes) else None

    def _images_of(self, id: str, rows: int) -> pd.DataFrame:
        assert self.images is not None
        own = self.images.get(id)
        if own is None or len(own) != rows:
            raise StoreError(
                f"{IMAGES_FILE}: must have the {rows} rows of the bag of {id}; got "
                f"{0 if own is None else len(own)}. Remove {IMAGES_FILE} and {ORIGIN_FILE} if the "
                "bags were changed."
            )
        return own


def read_origin(root: Path, backbone: str) -> Origin:
    """Read what a folder says of itself; any other folder holds the features of `backbone`."""
    path = root / ORIGIN_FILE
    if not path.exists():
        return Origin(backbone=backbone)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        images = pd.read_csv(
            root / IMAGES_FILE, dtype=str, keep_default_na=False, encoding_errors="surrogateescape"
        )
        return Origin(
            backbone=str(content["backbone"]),
            weights_sha256=str(content["weights_sha256"]),
            provenance=Provenance.from_json(content["provenance"]),
            images={str(id): own for id, own in images.groupby("patient", sort=False)},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path}: is damaged, or {IMAGES_FILE} is ({error}); export the store again."
        ) from None


def write_origin(store: FeatureStore, feature_set: FeatureSet, layout: str, folder: Path) -> None:
    """Write `export.json` and `images.csv` for a set of features of a store."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "layout": layout,
        "backbone": feature_set.backbone,
        "weights_sha256": feature_set.weights_sha256,
        "features": feature_set.name,
        "provenance": feature_set.provenance.to_json(),
        "store_recipe_sha256": store.recipe_sha256,
        "store_recipe": dict(store.recipe),
    }
    (folder / ORIGIN_FILE).write_text(json_text(content, indent=1), encoding="utf-8")
    pd.DataFrame(
        {
            "patient": np.repeat(store.ids, store.n_images),
            "image": list(store.image_names),
            "hash": list(store.image_hashes) or "",
        }
    ).to_csv(folder / IMAGES_FILE, index=False, errors="surrogateescape")
