"""The exceptions that lymphfeat raises for a user's mistake; every other exception is a bug."""


class LymphfeatError(Exception):
    """A mistake that the user can fix: one line that says what, where and what to do next."""


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
