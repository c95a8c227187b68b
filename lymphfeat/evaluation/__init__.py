"""Protocols and what they measure: metrics, intervals, decisions, baselines (METHOD §4-5)."""
