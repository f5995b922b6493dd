"""Write the tables of README.md and docs, between ``<!-- table:NAME -->`` and ``<!-- end -->``, from the results.

python benchmarks/tables.py
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import sparse_tables
import training_tables
from common import Row
from secateur.files import read_json, write_atomic
from secateur.report.html import count, size

PLACE = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that can have tables."""
    return [common.ROOT / "README.md", *sorted((common.ROOT / "docs").glob("*.md"))]


def fill(text: str, root: str = "") -> str:
    """``text`` with every marked table made anew; ``root`` is the way from its folder to the repository's."""
    return PLACE.sub(lambda found: found[1] + table(found[2], root) + found[3], text)


def filled(page: Path) -> str:
    return fill(page.read_text(encoding="utf-8"), "" if page.parent == common.ROOT else "../")


def table(name: str, root: str) -> str:
    """The newest results of benchmark ``name`` as Markdown, and where they come from."""
    path = common.newest(name)
    if path is None:
        return "\nNo results yet.\n\n"
    results = read_json(path)
    meta = results["meta"]
    source = f"{meta['cpu']}, {meta['threads']} threads, torch {meta['versions']['torch']}, commit {meta['commit']}"
    link = root + path.relative_to(common.ROOT).as_posix()
    head, *body = FORMS[name](results["rows"])
    lines = [head, ["---"] * len(head), *body]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"\n{rows}\n\n{source}: [{path.name}]({link})\n\n"


def _roads(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    yield (
        *("network", "pattern", "budget", "criterion", "dense", "pruned", "recalibrated", "2 epochs"),
        *("drop (95 %)", "parameters left", "MACs left", "bytes", "time of dense", "law's error"),
    )
    for row in rows.values():
        stages, drops = row["accuracy"], row["drop"]
        final = "recovered" if "recovered" in stages else list(stages)[-1]
        yield (
            *(row["net"], row["pattern"], row["budget"] or "-", row["criterion"]),
            *(
                f"{100 * stages[stage][0]:.1f}" if stages.get(stage) else "-"
                for stage in ("dense", "pruned", "recalibrated", "recovered")
            ),
            "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in drops[final])),
            f"{row['nonzero'][1] / row['nonzero'][0]:.0%}",
            f"{row['macs'][1] / row['macs'][0]:.1%}",
            size(row["bytes"][1]),
            row["latency_ratio"],
            f"{row['law']['error']:.0e}" if row["law"] else "-",
        )


def _analyze(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    yield ("", "seconds", "lowest to highest", "of torch.export", "parameters", "axes")
    for name, row in rows.items():
        median, low, high = row["seconds"]
        spread = f"{low:.2f} to {high:.2f}"
        yield (name, f"{median:.2f}", spread, f"{row['ratio']:.2f}", count(row["params"]), str(row["axes"]))


def _real(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    stages = ("dense", "pruned", "recalibrated", "recovered")
    yield ("network", "metric", "criterion", *stages, "change (95 %)", "parameters left", "MACs left", "law's error")
    for row in rows.values():
        yield (
            *(row["net"], row["unit"], row["criterion"]),
            *(f"{row['stages'][stage]:.1f}" if stage in row["stages"] else "-" for stage in stages),
            "{:+.1f} ({:+.1f} to {:+.1f})".format(*row["change"]),
            *(f"{row[what][1] / row[what][0]:.1%}" for what in ("params", "macs")),
            f"{row['law']['error']:.0e} ({row['law']['oracle']})",
        )


def _zoo(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """Outcomes per list of models, beside those of other tools."""
    outcomes = ("law", "forward", "less", "nothing", "refused", "wrong", "crash", "hang")
    yield (
        *("models", "tool", "number", "law holds", "runs, not checked", "less removed than asked", "nothing removed"),
        *("refused", "wrong", "crash", "hang", "99 % reachable"),
    )
    tools = {"Secateur": rows} | {name: common.rows(f"zoo_{name}") for name in ("torch-pruning", "torch-kirigami")}
    for group in ("timm", "hf", "torchvision"):
        for tool, found in tools.items():
            mine = [row for key, row in found.items() if key.startswith(f"{group}/")]
            counts = Counter(_outcome(row) for row in mine)
            far = str(sum(row.get("reachable", 0) >= 0.99 for row in mine)) if tool == "Secateur" else "-"
            if mine:
                yield (group, tool, str(len(mine)), *(str(counts[outcome]) for outcome in outcomes), far)


def _outcome(row: Row) -> str:
    """The column of a row. Where much less was removed than the 40 % asked for, that is said in place of the law."""
    outcome = str(row["outcome"])
    if outcome == "frozen":
        return "less" if "left" in row else "nothing"
    return "less" if outcome in ("law", "forward") and row["left"] > 0.65 else outcome


def _scale(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    steps = ("export", "analysis", "plan", "shrink")
    yield ("model", "parameters", "axes", "torch.export", "analysis beyond it", "plan", "shrink", "peak memory")
    for name, row in rows.items():
        seconds = row["seconds"]
        yield (
            *(name, count(row["params"]), f"{row['axes']}"),
            *(f"{seconds[step]:.1f} s" if step in seconds else "-" for step in steps),
            size(row["memory"]),
        )


def _depth(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    stages = ("dense", "pruned", "recalibrated", "recovered")
    units = {"resnet56": ("right, %", 100), "llama": ("perplexity", 1)}
    heads = ("network", "metric", "budget", "criterion", "blocks that go", *stages)
    yield (*heads, "parameters left", "MACs left", "law's error")
    for row in sorted(rows.values(), key=lambda row: (row["net"], row["criterion"], row["seed"])):
        yield (
            *(row["net"], units[row["net"]][0], row["budget"], row["criterion"], str(len(row["dropped"]))),
            *(
                f"{units[row['net']][1] * row['score'][stage]:.1f}" if stage in row["score"] else "-"
                for stage in stages
            ),
            *(f"{row[what][1] / row[what][0]:.1%}" for what in ("params", "macs")),
            f"{row['law'][0]:.0e}",
        )


def _criteria(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """A row per criterion and allocation, the networks side by side."""
    columns = sorted({(row["net"], key) for row in rows.values() for key in row if key.startswith("macs=")})
    yield ("criterion", "scores of a unit", "allocation", *(f"{net}, {budget}" for net, budget in columns))
    found: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    for row in rows.values():
        here = found.setdefault((row["criterion"], row["pooled"], row["allocate"]), {})
        here.update({(row["net"], key): value for key, value in row.items() if key.startswith("macs=")})
    for names, values in found.items():
        yield (*names, *(f"{100 * values[column]:.1f}" if column in values else "-" for column in columns))


def _costs(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """Ratios to the first row, with the lowest and highest of all rounds."""
    nets = [name for name in next(iter(rows.values())) if name != "seconds"]
    yield ("", *nets)
    for name, row in rows.items():
        yield (name, *("{:.1f} ({:.1f} to {:.1f})".format(*row[net]) for net in nets))


def _channels(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """A line for each network, ratio and method: the means over its seeds. What choices went by is left out."""
    stages = ("pruned", "recalibrated", "least_squares", "blockwise", "recovered")
    trained = max((row.get("epochs", 0) for row in rows.values()), default=0)
    yield (
        *("network", "MACs fewer", "method", "dense", "pruned", "recalibrated", "least squares", "blockwise"),
        *(f"{trained} epochs", "drop (95 %)", "parameters left", "MACs left"),
    )
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for key, row in rows.items():
        net, point, *method = key.split()
        if net != "choice" and point != "dense":
            name = "half of each block" if point == "half" else " ".join(method[:-1])
            groups.setdefault((net, point, name), []).append(row)
    for (net, point, method), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        found = {s: had for s in stages if (had := [row["stages"][s] for row in group if s in row["stages"]])}
        drops = zip(*(stage["drop"] for stage in list(found.values())[-1]), strict=True)
        yield (
            *(net, "-" if point == "half" else point, method),
            f"{100 * rows[f'{net} dense']['stages']['dense']['test']:.1f}",
            *(f"{100 * fmean(stage['test'] for stage in found[s]):.1f}" if s in found else "-" for s in stages),
            "{:.1f} ({:.1f} to {:.1f})".format(*(100 * fmean(values) for values in drops)),
            *(f"{fmean(row[what][1] / row[what][0] for row in group):.1%}" for what in ("params", "macs")),
        )


def _plain(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """Every field, as it is."""
    heads = list(next(iter(rows.values())))
    yield ("", *(head.replace("_", " ") for head in heads))
    for name, row in rows.items():
        yield (name, *(_number(row[head]) for head in heads))


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_number, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _curves(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """A row for each network, pattern and criterion, a column for each part that is left; pruned, then compensated."""
    parts = sorted({row["left"] for row in rows.values()}, reverse=True)
    yield ("network", "pattern", "criterion", *(f"{part:.0%} left" for part in parts))
    found: dict[tuple[str, ...], dict[float, str]] = {}
    for row in rows.values():
        stages = row.get("stages", {})
        said = " → ".join(f"{100 * stages[name][0]:.1f}" for name in ("pruned", "compensated") if name in stages)
        found.setdefault((row["net"], row["pattern"], row["criterion"]), {})[row["left"]] = said or "refused"
    for key, values in found.items():
        yield (*key, *(values.get(part, "-") for part in parts))
    for net in dict.fromkeys(row["net"] for row in rows.values()):
        dense = next(row["dense"] for row in rows.values() if row["net"] == net)
        yield (net, "dense", "", f"{100 * dense[0]:.1f}", *[""] * (len(parts) - 1))


def _audit(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    yield (
        *("network", "pattern", "limit", "splits", "kept", "dense model returned"),
        *("drop where never looked at: median, lowest, highest", "left: median, least, most"),
    )
    for row in rows.values():
        yield (
            *(row["net"], row["pattern"], f"{100 * row['limit']:g} points", str(row["splits"]), str(row["kept"])),
            str(row["dense returned"]),
            ", ".join(f"{100 * drop:.2f}" for drop in row["drop"]),
            ", ".join(f"{part:.1%}" for part in row["part"]) + f" of {row['of'].replace('sparsity', 'weights')}",
        )


def _files(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """A line for each network and pattern: the packed file as a part of the dense one, and times at one sparsity."""
    parts = sorted({row["sparsity"] for row in rows.values()})
    ways = ("whole", "packed", "engine")
    timed = next((f"{row['sparsity']} %" for row in rows.values() if "load" in row), "-")
    yield (
        *("network", "pattern", "dense file", *(f"{part} % zeros" for part in parts), f"masked weights at {timed}"),
        *(f"load at {timed}, ms: dense file", "packed", "packed, engine"),
        *("first answer, ms: dense file", "packed", "packed, engine"),
    )
    lines: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows.values():
        lines.setdefault((row["net"], row["pattern"]), {})[row["sparsity"]] = row
    for (net, pattern), found in lines.items():
        at = next((row for row in found.values() if "load" in row), None)
        yield (
            *(net, pattern, size(next(iter(found.values()))["file"][0])),
            *(f"{row['file'][1] / row['file'][0]:.1%}" if (row := found.get(part)) else "-" for part in parts),
            f"{at['masked weights'][1] / at['masked weights'][0]:.1%}" if at else "-",
            *(f"{1000 * at[what][way]:.0f}" if at else "-" for what in ("load", "first answer") for way in ways),
        )


FORMS: dict[str, Callable[[dict[str, Row]], Iterable[Sequence[str]]]] = {
    "first_road": _roads,
    "analyze_cost": _analyze,
    "cost_global": _plain,
    "compat_memory": _plain,
    "zoo": _zoo,
    "real_nets": _real,
    "scale": _scale,
    "depth": _depth,
    "cifar_channel": _channels,
    "criteria": _criteria,
    "criteria_cost": _costs,
    "curves": _curves,
    "promise_audit": _audit,
    "packed_files": _files,
    "sparse_kernels": sparse_tables.kernels,
    "sparse_models": sparse_tables.models,
    "gpu": sparse_tables.gpu,
    "training": training_tables.methods,
    "training_cost": training_tables.costs,
}


def main() -> None:
    for page in pages():
        write_atomic(page, filled(page))


if __name__ == "__main__":
    main()
