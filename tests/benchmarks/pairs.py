"""Times of two functions as ratios of neighbouring pairs, since absolute times drift with what else a machine does."""

import statistics
import time

PAIRS = 9  # an odd number


def paired(first, second, clock=time.process_time):
    """(median, low, high) of first/second over PAIRS neighbouring pairs, after one warm-up of each.

    low and high are the second least and the second greatest ratio, between which the true median is with 96 %.

    Args:
      clock: time.process_time, which other processes disturb least, or time.perf_counter for threads and waiting.
    """
    first(), second()
    ratios = []
    for i in range(PAIRS):
        times = {run: _seconds(run, clock) for run in ((first, second) if i % 2 else (second, first))}
        ratios.append(times[first] / times[second])
    ratios.sort()
    return statistics.median(ratios), ratios[1], ratios[-2]


def _seconds(run, clock):
    start = clock()
    run()
    return clock() - start
