"""Tests that measure, on machines where others compute as well: go first; and tell whether a machine keeps its pace at all."""
import os
import time


def go_first():
    """This process and what it starts come before others wherever both want a processor: where we may ask for that."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    except PermissionError:
        pass


def unsteady():
    """Does the same piece of work take half as long again at times?"""
    took = []
    for _ in range(60):
        begun = time.perf_counter()
        sum(range(600000))
        took.append(time.perf_counter() - begun)
    took.sort()
    print(f"the same work took {took[0] * 1e3:.1f} to {took[-1] * 1e3:.1f} ms, {took[len(took) * 3 // 4] * 1e3:.1f} three times in four at most")
    return took[len(took) * 3 // 4] > 1.3 * took[0] or took[-1] > 2 * took[0]
