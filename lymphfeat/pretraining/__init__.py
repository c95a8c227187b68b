"""Self-supervised pre-training: unlabelled cells -> backbone weights.

run.py is the entry point; trainer.py takes the steps, pairs.py draws the pairs that should look
alike, probe.py measures progress.
"""
