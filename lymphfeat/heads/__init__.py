"""Heads: bags, aggregators, and the engine that fits many heads at once (METHOD §2)."""
