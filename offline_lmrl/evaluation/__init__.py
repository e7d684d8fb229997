"""Means with intervals, and evaluation of policies and scorers from logs and by play. Import submodules by name."""
