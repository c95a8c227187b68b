"""Self-supervised pre-training: unlabelled cells -> backbone weights.

run.py is the way in; trainer.py makes the steps, pairs.py draws what is to look alike, probe.py
measures on the way.
"""
