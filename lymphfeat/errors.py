"""The exceptions that lymphfeat raises for a user's mistake; every other exception is a bug."""

_LONGEST = 8000  # characters of a message: a damaged file may be quoted in it


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)


class LymphfeatError(Exception):
    """A mistake that the user can fix: one line that says what, where and what to do next.

    Text of the user's files in it can neither break the line nor steer a terminal.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[:_LONGEST]}… ({len(text)} characters)"
        if text.isprintable():
            return text
        return "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
        )


class CohortError(LymphfeatError, ValueError):
    """A cohort's table or image folders cannot be read as they are."""


class StoreError(LymphfeatError, ValueError):
    """A feature store is damaged, unfinished, or of another recipe."""


class WeightsError(LymphfeatError, ValueError):
    """Backbone weights cannot be found or do not fit the backbone."""


class SettingsError(LymphfeatError, ValueError):
    """A setting is out of range or contradicts another."""


class ModelError(LymphfeatError, ValueError):
    """A model folder is damaged or does not fit what it is applied to."""


class LeakageError(LymphfeatError, ValueError):
    """An evaluation would use what was learnt from the patients it is measured on."""


class OutputError(LymphfeatError, OSError):
    """A result cannot be written: the disk is full or the place is closed to the user."""
