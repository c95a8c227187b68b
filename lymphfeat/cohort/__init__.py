"""Cohorts on disk: tables, attributes, images, splits, and provenance."""
