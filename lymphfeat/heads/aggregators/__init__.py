"""Aggregators: how instance scores become a patient's score (METHOD §2)."""
