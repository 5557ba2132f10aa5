"""Figures of jobs that took turns: spreads, ratios with their certainty, tables.

Owns: the arithmetic that the drivers here share. A round is one turn of every way that is compared; intervals are bootstraps over
rounds, since what disturbs one exchange or step often disturbs the next, from a fixed seed, so that they can be computed again.
"""
import math
import random
import statistics


def spread(values):
    q = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "q1": q[0], "q3": q[2]}


def trimmed(values):
    values = sorted(values)
    cut = len(values) // 10
    return statistics.fmean(values[cut:len(values) - cut])


def bootstrap(rounds, of, draws=1000, sure=0.95):
    """[of(rounds), and the bounds of its 95 % (`sure`) interval]."""
    draw = random.Random(1)
    found = sorted(of(draw.choices(rounds, k=len(rounds))) for _ in range(draws))
    return [of(rounds), found[int(draws * (1 - sure) / 2)], found[min(draws - 1, int(draws * (1 + sure) / 2))]]


def difference(turns, rounds=1000):
    """Per cent by which the second job's steps take longer than their twins, and its 95 % interval; turns: [[times], [times]] each."""
    logs = [[math.log(y / x) for x, y in zip(*turn)] for turn in turns]
    return tuple(bootstrap(logs, lambda chosen: (math.exp(trimmed([v for turn in chosen for v in turn])) - 1) * 100, rounds))


def ratio(rounds, over, under):
    """Median of rounds[...][over] over median of rounds[...][under], and its 95 % interval; one number per round and way."""
    return bootstrap(rounds, lambda chosen: statistics.median([r[over] for r in chosen]) / statistics.median([r[under] for r in chosen]))


def table(rows):
    """Rows of text, the first one the heading, as a Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * w for w in widths]] + rows[1:]
    return "\n".join("| %s |" % " | ".join(c.ljust(w) for c, w in zip(row, widths)) for row in rows)
