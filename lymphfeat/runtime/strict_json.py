"""JSON as defined by RFC 8259, for results and files: every JSON reader can read it.

Python's own writer writes NaN and Infinity, which are not JSON.
"""

import json
import math
from collections.abc import Mapping
from datetime import date
from pathlib import PurePath
from typing import Any


def json_text(value: object, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Write a value as JSON; numbers that are not finite become null.

    Accepts what `json.dumps` does, and NumPy numbers and arrays, paths and dates. Raises TypeError
    for anything else.
    """
    return json.dumps(json_value(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def json_value(value: Any) -> Any:
    """Return a value as it is after a round trip through JSON."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays; commands start without NumPy
        return json_value(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, date):
        return value.isoformat()
    return value
