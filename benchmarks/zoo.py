"""The zoo: timm families, tiny Hugging Face architectures, torchvision models, pruned to 60 % of their parameters.

    python benchmarks/zoo.py [--list timm] [--only 'hf/*'] [--tool torch-pruning] [--out rows.json]

Every model runs in a process of its own, two at a time. Rows are written as they come; rows of the same commit are not
run again. ``--only failed`` runs what did not end with the law. zoo_law.py says what the outcomes mean, zoo_peers.py
how the other tools are called.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import common
import zoo_models
from secateur.files import read_json, write_atomic
from zoo_entry import Entry
from zoo_law import law_row

Row = dict[str, Any]

SECONDS = {"secateur": 600, "torch-pruning": 60, "torch-kirigami": 60}  # of processor time
TINY = 10  # for other tools and the tiny models of Hugging Face
PATIENCE = 60  # times as long by the clock, for what waits instead of computing; the machine may be busy
MEMORY = 16 * 2**30
LISTS = ("timm", "hf", "torchvision")


def tool(name: str) -> Callable[[Entry], Row]:
    """The function that gives a model's row with the tool of that name."""
    if name == "secateur":
        return law_row
    import zoo_peers

    return zoo_peers.PEERS[name]


def limit(name: str, entry: Entry) -> int:
    """Seconds of processor time that a tool has for a model."""
    return TINY if name != "secateur" and entry.group == "hf" else SECONDS[name]


def prepare() -> None:
    """Import and warm up what every child process needs, once; one thread each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    common.torchvision()  # before timm, which imports it
    import timm  # noqa: F401
    import transformers

    transformers.logging.set_verbosity_error()
    law_row(next(entry for entry in zoo_models.entries() if entry.key == "hf/qwen2"))


def child(answer: Callable[[Entry], Row], entry: Entry, pipe: Connection, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    pipe.send(answer(entry))


def run_all(todo: Iterable[Entry], name: str, workers: int, done: Callable[[Entry, Row], None]) -> None:
    """Every model in a process of its own. A process without an answer in time is ended: hang; a dead one: crash."""
    answer, context = tool(name), multiprocessing.get_context("fork")
    waiting = list(todo)[::-1]
    running: dict[Connection, tuple[Entry, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            entry = waiting.pop()
            mine, theirs = context.Pipe(duplex=False)
            seconds = limit(name, entry)
            process = context.Process(target=child, args=(answer, entry, theirs, seconds), daemon=True)
            process.start()
            theirs.close()
            running[mine] = entry, process, time.monotonic() + PATIENCE * seconds
        ready = wait(list(running), timeout=1)
        for pipe, (entry, process, last) in list(running.items()):
            if pipe not in ready and time.monotonic() < last:
                continue
            row = receive(pipe, process) if pipe in ready else {"outcome": "hang", "message": "waits for ever"}
            process.kill()
            process.join()
            pipe.close()
            del running[pipe]
            done(entry, row)


def receive(pipe: Connection, process: BaseProcess) -> Row:
    try:
        return dict(pipe.recv())
    except EOFError:
        process.join()
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return {"outcome": "hang", "message": "no answer within the processor time"}
        return {"outcome": "crash", "message": f"the process died with exit code {process.exitcode}"}


class Results:
    """Rows by model, written after every one: to ``out``, or to the results of the day."""

    def __init__(self, name: str, out: Path | None) -> None:
        self.name, self.out = "zoo" if name == "secateur" else f"zoo_{name}", out
        if out is None:
            self.rows = common.rows(self.name, today=True)
        else:
            self.rows = read_json(out)["rows"] if out.exists() else {}

    def add(self, key: str, row: Row) -> None:
        self.rows[key] = row
        order = {entry.key: i for i, entry in enumerate(zoo_models.entries())}
        self.rows = dict(sorted(self.rows.items(), key=lambda item: order.get(item[0], len(order))))
        if self.out is None:
            common.save(self.name, self.rows)
        else:
            write_atomic(self.out, json.dumps({"name": self.name, "rows": self.rows}, indent=1) + "\n")


def summary(rows: dict[str, Row]) -> str:
    """Counts per list and outcome, and how many models have 99 % of their parameters in reach."""
    lines = []
    for group in LISTS:
        mine = [row for key, row in rows.items() if key.startswith(f"{group}/")]
        if mine:
            counts = Counter(row["outcome"] for row in mine).most_common()
            far = sum(row.get("reachable", 0) >= 0.99 for row in mine)
            told = ", ".join(f"{count} {outcome}" for outcome, count in counts)
            lines.append(f"{group}: {len(mine)} models: {told}; {far} with at least 99 % of parameters in reach")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune every model of the zoo; resumable.")
    parser.add_argument("--list", choices=LISTS, help="one list only")
    parser.add_argument("--only", default="*", help="glob over list/name, or 'failed'")
    parser.add_argument("--tool", choices=SECONDS, default="secateur")
    parser.add_argument("--workers", type=int, default=2, help="models at a time")
    parser.add_argument("--out", type=Path, help="a file of your own for the rows, instead of the committed results")
    parser.add_argument("--no-resume", action="store_true", help="run models again that have a row of this commit")
    wish = parser.parse_args()
    commit, results = common.commit(), Results(wish.tool, wish.out)

    def wanted(entry: Entry) -> bool:
        row = results.rows.get(entry.key)
        if wish.list and entry.group != wish.list:
            return False
        if wish.tool != "secateur" and entry.name in zoo_models.DETECTION:
            return False
        if wish.only == "failed":
            return row is None or row["outcome"] != "law"
        if row is not None and row["commit"] == commit and not wish.no_resume:
            return False
        return fnmatch(entry.key, wish.only)

    todo = [entry for entry in zoo_models.entries() if wanted(entry)]
    begun = time.monotonic()

    def done(entry: Entry, row: Row) -> None:
        results.add(entry.key, row | {"commit": commit})
        done.count += 1  # type: ignore[attr-defined]
        spent = time.monotonic() - begun
        print(f"{done.count}/{len(todo)} {spent:5.0f} s  {entry.key:36} {row['outcome']:8}", end=" ")  # type: ignore[attr-defined]
        print(f"{row.get('reachable', 0):6.1%}  {row['message'][:100]}", flush=True)

    done.count = 0  # type: ignore[attr-defined]
    prepare()
    run_all(todo, wish.tool, wish.workers, done)
    print(summary(results.rows))


if __name__ == "__main__":
    main()
