"""One cell of a clinical table -> its value: nothing is guessed, no trace of a spelling is kept.

Each parser takes a non-missing cell's text without surrounding spaces and raises ValueError with
the reason and the remedy; the code that reads the table adds file, row and column.
"""

import math
import re
from datetime import date

MISSING = frozenset({"", "na", "n/a", "nan", "null"})
UNKNOWN = -1
MAX_AGE = 120
MAX_COUNT = 2000  # 10⁹/L; more is a count per another volume
MAX_ID_BYTES = 255  # of a folder's name
DAYS_PER_YEAR = 365.25

# METHOD §6: the separator alone determines the convention, so no date is ambiguous.
DATE_FORMS = {
    "M/D/YYYY": re.compile(r"(?P<m>\d{1,2})/(?P<d>\d{1,2})/(?P<y>\d{4})", re.ASCII),
    "DD-MM-YYYY": re.compile(r"(?P<d>\d\d)-(?P<m>\d\d)-(?P<y>\d{4})", re.ASCII),
    "YYYY-MM-DD": re.compile(r"(?P<y>\d{4})-(?P<m>\d\d)-(?P<d>\d\d)(?:[ T]00:00:00)?", re.ASCII),
}
_LIKE_A_DATE = re.compile(
    r"\d{1,4}([/.-])\d{1,2}\1\d{1,4}([ T]\d.*)?|\d{1,2}[ -][A-Za-z]{3,9}[ -]\d{2,4}", re.ASCII
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_WITH_COMMA = re.compile(r"[+-]?\d[\d.]*,[\d.,]*\d", re.ASCII)
GENDERS = {"f": "F", "female": "F", "m": "M", "male": "M"}


def is_missing(text: str) -> bool:
    """Return whether a cell denotes a missing value."""
    return text.lower() in MISSING


def date_form(text: str) -> str | None:
    """Return the convention in which a date is written; None for any other text."""
    return next((form for form, pattern in DATE_FORMS.items() if pattern.fullmatch(text)), None)


def is_ambiguous_date(text: str) -> bool:
    """Return whether a DD-MM-YYYY date is a different day when read month first."""
    match = DATE_FORMS["DD-MM-YYYY"].fullmatch(text)
    return match is not None and int(match["d"]) <= 12 and match["d"] != match["m"]


def looks_like_date(text: str) -> bool:
    """Return whether a cell looks like a date, even in a form that `parse_date` refuses."""
    return _LIKE_A_DATE.fullmatch(text) is not None


def parse_date(text: str) -> date:
    """Read M/D/YYYY (with `/`), DD-MM-YYYY (with `-`) or YYYY-MM-DD (METHOD §6)."""
    form = date_form(text)
    if form is None:
        raise ValueError(f"must be {', '.join(DATE_FORMS)} or empty; got {text!r}")
    match = DATE_FORMS[form].fullmatch(text)
    assert match is not None
    try:
        return date(int(match["y"]), int(match["m"]), int(match["d"]))
    except ValueError:
        raise ValueError(f"{text!r} is not a date when read as {form}; write YYYY-MM-DD") from None


def parse_age(text: str, reference_date: date) -> float:
    """Read a date of birth as the age in years on `reference_date`, in [0, 120]."""
    age = (reference_date - parse_date(text)).days / DAYS_PER_YEAR
    if not 0 <= age <= MAX_AGE:
        raise ValueError(
            f"must be within the {MAX_AGE} years before the reference date {reference_date}; "
            f"got {text!r}; fix it or choose another --reference-date"
        )
    return age


def parse_gender(text: str) -> str:
    """Read F or M, in either case or written out."""
    try:
        return GENDERS[text.lower()]
    except KeyError:
        raise ValueError(
            f"must be F, M or empty; got {text!r}; a column with another name may hold any text"
        ) from None


def parse_label(text: str) -> int:
    """Read 1 (tumoral), 0 (reactive) or -1 (unknown); `1.0` is 1."""
    if _NUMBER.fullmatch(text) and float(text) in (-1.0, 0.0, 1.0):
        return int(float(text))
    raise ValueError(f"must be 1 (tumoral), 0 (reactive), or -1 or empty (unknown); got {text!r}")


def parse_split(text: str) -> str:
    """Read `train` or `test`, in either case."""
    if text.lower() not in ("train", "test"):
        raise ValueError(f"must be train, test or empty; got {text!r}")
    return text.lower()


def parse_number(text: str) -> float:
    """Read a finite decimal number with a point."""
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    if math.isinf(value):
        raise ValueError(f"must be a number with a decimal point, or empty; got {text!r}")
    return value


def parse_count(text: str) -> float:
    """Read a lymphocyte count, a number above 0 because models take its logarithm."""
    value = parse_number(text)
    if value <= 0:
        raise ValueError(f"must be above 0, or empty; got {text!r}")
    if value > MAX_COUNT:
        raise ValueError(
            f"must be in 10⁹/L, at most {MAX_COUNT}, or empty; got {text!r}; give a column of "
            "another unit another name"
        )
    return value


def parse_years(text: str) -> float:
    """Read an age in years, in [0, 120]."""
    if looks_like_date(text):
        raise ValueError(f"must be in years; got {text!r}; name a column of dates of birth `dob`")
    value = parse_number(text)
    if not 0 <= value <= MAX_AGE:
        raise ValueError(f"must be in years, 0 to {MAX_AGE}, or empty; got {text!r}")
    return value


def is_number_with_comma(text: str) -> bool:
    """Return whether a cell is a number with a decimal comma, or with commas between thousands."""
    return _WITH_COMMA.fullmatch(text) is not None


def wrong_id(id: str) -> str:
    """Say why an id cannot be the name of a folder of images; empty if it can."""
    if not id.isprintable():
        return "has characters that are not printed"
    if len(id.encode(errors="surrogateescape")) > MAX_ID_BYTES:
        return f"is longer than {MAX_ID_BYTES} bytes"
    return "cannot be a folder's name" if "/" in id or id in (".", "..") else ""
