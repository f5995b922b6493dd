"""Tables of pruning while training."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean, stdev

from common import Row

LEVELS = ("20%", "50%", "70%", "80%", "90%", "95%", "98%", "2:4", "channel 2x")
KEY = re.compile(rf"(?P<net>\w+) (?:(?P<level>{'|'.join(LEVELS)}) )?(?P<method>.+) (?P<seed>\d+)")


def methods(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """A line for a network and a method, a column for a sparsity: mean and standard deviation over seeds."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, row in rows.items():
        if "test" in row and (part := KEY.fullmatch(key)):
            found[part["net"], part["method"]][part["level"] or "dense"].append(100 * row["test"])
    yield ("network", "method", "dense", *LEVELS)
    nets = list(dict.fromkeys(net for net, _ in found))
    for (net, method), levels in sorted(found.items(), key=lambda item: nets.index(item[0][0])):
        yield (net, method, *(_spread(levels.get(level, [])) for level in ("dense", *LEVELS)))


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def costs(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    yield ("", "dense step, ms", "with masks, times as long", "middle half of the ratios", "bits a weight")
    for name, row in rows.items():
        if name == "update":
            weights = row["weights"] / 1e6
            yield (f"update of {weights:.0f} M weights: {row['median']:.2f} s", "", "", "", "")
        else:
            low, high = row["quartiles"]
            ratio = f"{row['ratio']:.3f}"
            yield (name, f"{row['dense_ms']:.1f}", ratio, f"{low:.3f} to {high:.3f}", f"{row['bits_per_weight']:.2f}")
