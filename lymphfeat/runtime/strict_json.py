"""JSON as defined by RFC 8259, for results and files: every JSON reader can read it.

Python's own writer writes NaN and Infinity, which are not JSON, and its reader reads them.
"""

import json
import math
from collections.abc import Mapping
from datetime import date
from pathlib import PurePath
from typing import Any, NoReturn

_DIGITS = 20  # of a whole number: 64 bits, as other readers have


def parse_json(text: str | bytes) -> Any:
    """Read JSON text; raises ValueError for anything else, however deep or long it is.

    Numbers are finite, and whole ones have 20 digits at most: nothing that is made of them
    overflows at once.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_DIGITS]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS:
        raise ValueError(f"the number {text[:_DIGITS]}… has more than {_DIGITS} digits")
    return int(text)


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
