"""Metrics with intervals, evaluation by logs and by play, and comparisons of methods. Import submodules by name."""
