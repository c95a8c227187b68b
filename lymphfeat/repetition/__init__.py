"""Results made again from what they record, and compared with what they were."""
