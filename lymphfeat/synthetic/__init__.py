"""The synthetic cohort: patients, rendered cells, and the folder they are written to."""
