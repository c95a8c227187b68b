"""lymphfeat: reactive or tumoral lymphocytosis from bags of blood-cell images."""

__version__ = "0.1.0"
