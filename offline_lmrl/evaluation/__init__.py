"""Metrics with intervals, what logs alone can say, and the comparison of methods; import the submodules by name."""
