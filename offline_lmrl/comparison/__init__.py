"""Comparisons of methods over seeds: the runs, the statistics of their results, tables, figures and the page."""
