"""Training a backbone and a head together (METHOD §3)."""
