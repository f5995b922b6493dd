"""Tables of what sparse layers and networks gain, on the CPU engine and on CUDA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

Row = dict[str, Any]

AT = (0.5, 0.7, 0.8, 0.9, 0.95)


def kernels(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """A line for each layer, form and number of threads; cells: times as fast as eager torch / as the fastest dense
    runtime of the same precision / the part of the roofline.
    """
    dense = "fastest dense of the same precision, ms"
    yield (
        "layer",
        "threads",
        "form",
        *(f"{at:.0%} zeros" for at in AT),
        f"torch, ms; {dense}",
        "2 threads over 1, 90 %",
    )
    timed = [row for row in rows.values() if "ms" in row]
    for (layer, threads, form), group in groupby(timed_in_order(timed), line_of):
        found = {row["sparsity"]: row for row in group}
        last = found.get(0.9) or list(found.values())[-1]
        cells = (kernel_cell(found.get(at), found.get(0.0)) for at in AT)
        other = next((r for r in timed if line_of(r) == (layer, 1, form) and r["sparsity"] == 0.9), None)
        scaling = f"{other['ms'][0] / last['ms'][0]:.2f}" if threads == 2 and other and 0.9 in found else ""
        ms = f"{last['dense']['torch'][0]:.3g}; {last['dense'][last['best']][0]:.3g} ({last['best']})"
        yield (layer, str(threads), form, *cells, ms, scaling)


def timed_in_order(rows: list[Row]) -> list[Row]:
    """Rows of a line next to each other, lines as they first came."""
    first: dict[Any, int] = {}
    for row in rows:
        first.setdefault(line_of(row), len(first))
    return sorted(rows, key=lambda row: first[line_of(row)])


def line_of(row: Row) -> tuple[str, int, str]:
    return row["layer"], row["threads"], row["form"]


def kernel_cell(row: Row | None, whole: Row | None) -> str:
    if row is None:
        return "-"
    part = row.get("of_bytes")
    if part is None and whole is not None:
        part = row["macs_per_ms"] / whole["macs_per_ms"]
    gains = f"{row['vs_torch'][0]:.1f} / {row['vs_best'][0]:.1f}"
    return gains if part is None else f"{gains} / {part:.0%}"


RUNTIMES = ("torch", "torch.compile", "onnxruntime", "openvino", "torch bfloat16", "openvino bfloat16")


def models(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """A line for each network, pattern, sparsity and number of threads: how many times as fast as each runtime.

    The lowered network runs in eager torch; ``compiled`` is the same under torch.compile.
    """
    heads = (
        "network",
        "threads",
        "pattern",
        "zeros",
        "lowered, ms",
        "compiled, ms",
        *(f"than {name}" for name in RUNTIMES),
    )
    yield (*heads, "layers by form", "largest difference")
    for row in rows.values():
        names = (row["net"], str(row["threads"]), row["pattern"], f"{row['sparsity']:.0%}")
        if "ms" not in row:
            yield (*names, "refused", "-", *["-"] * len(RUNTIMES), row.get("refused", "-"), "-")
            continue
        gains = row["times_as_fast"]
        forms = ", ".join(f"{count} {form}" for form, count in sorted(row["forms"].items(), key=lambda i: -i[1]))
        cells = (f"{gains[name][0]:.2f}" if name in gains else "-" for name in RUNTIMES)
        compiled = f"{row['compiled_ms'][0]:.3g}" if "compiled_ms" in row else "-"
        yield (*names, f"{row['ms'][0]:.3g}", compiled, *cells, forms, f"{row['error']:.0e}")


def gpu(rows: dict[str, Row]) -> Iterable[Sequence[str]]:
    """Layers: milliseconds of every form and how many times as fast the best is; then whole networks."""
    forms = ("dense", "CUTLASS", "cuSPARSELt", "cuSPARSELt best")
    yield ("on the card", *(f"{form}, ms" for form in forms), "times as fast", "notes")
    for key, row in rows.items():
        section, name = key.split(" | ")
        if section == "layers" and "ms" in row:
            ms = (f"{row['ms'][form][0]:.4g}" if form in row["ms"] else "-" for form in forms)
            yield (name, *ms, f"{row['times_as_fast']:.2f}", "; ".join(f"{k}: {v}" for k, v in row["notes"].items()))
        elif section in ("models", "road") and "ms" in row:
            dense, *others = (times[0] for times in row["ms"].values())
            gain = "{:.2f} ({:.2f} to {:.2f})".format(*row["times_as_fast"])
            what = (
                f"{row['taken']} of {row['layers']} layers" if "taken" in row else f"{row['left']:.0%} of the weights"
            )
            yield (name, f"{dense:.4g}", "-", "-", f"{others[0]:.4g}", gain, what)
        elif "failed" in row or "skipped" in name:
            yield (f"{section}: {name}", *["-"] * 5, row.get("failed") or ", ".join(row.get("names", ())))
