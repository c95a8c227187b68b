"""Cohorts on disk: tables, attributes, images, splits, and whose data went into what."""
