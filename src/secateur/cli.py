"""The command line. Parses words, calls the library, prints; torch is loaded only once a command runs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from secateur.errors import PruneError, SpecError
from secateur.files import require_folder

if TYPE_CHECKING:
    from secateur.report import Report


class _Commands(TyperGroup):
    """Turns a user's mistake into one line on stderr and exit code 2; ``--debug`` gives the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (PruneError, OSError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"secateur: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, torchvision:NAME, hf:PATH_OR_ID, package.module:factory, ./file.py:factory, "
        "or a directory that prune wrote.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="digits, a folder of class folders of images, also below train, val and test; an .npz, a .txt, "
        "a .tsv of text and label; module:factory or file.py:factory.",
    ),
]
Input = Annotated[
    str | None,
    typer.Option(metavar="1x3x32x32", help="Shape of a random example input; else the first of DATA."),
]
Dense = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The dense model, where MODEL is a directory whose class only you have."),
]
Tie = Annotated[
    list[str] | None,
    typer.Option(metavar="A=B", help="Two axes, or dimensions such as left.weight:0, that keep the same units."),
]
FreeOutput = Annotated[
    list[int] | None, typer.Option(metavar="N", help="Output tensor, from 0, that may lose channels; repeatable.")
]
Pattern = Annotated[str, typer.Option(help="unstructured, 2:4, block:4x1, channel, channel/8, layer or channel+layer.")]
Criterion = Annotated[
    str | None,
    typer.Option(
        help="magnitude, l2, random, bn_scale, fpgm, lamp; with DATA taylor, activation, apoz, fisher, block_fisher, "
        "obd; or module:function. For layers influence, reconstruction, taylor, magnitude or random. "
        "Default: magnitude, for layers influence."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="sparsity=90%, params=50%, macs=50%, size=10MB, latency=50%, latency=5ms or threshold=1e-3; or "
        "max_drop=1%: the smallest model shown to lose no more. Patterns such as 2:4 need none."
    ),
]
Ignore = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Weights, axes or blocks to leave alone; repeatable.")
]
Override = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB=PART", help="Remove that part there, such as 'layer1.*=30%'; repeatable."),
]
Minimum = Annotated[
    list[str] | None,
    typer.Option(metavar="[GLOB=]N", help="Units that axes keep at least, such as 16, 25% or 'layer1.*=16'."),
]
Reconstruct = Annotated[
    str | None, typer.Option(help="Compensate before any training: bias, least_squares or blockwise.")
]
Rounds = Annotated[int, typer.Option(min=1, help="Reach the budget in rounds of pruning and epochs.")]
Schedule = Annotated[str, typer.Option(help="Of the learning rate: cosine, rewind or module:function.")]
Optimizer = Annotated[str, typer.Option(help="sgd, or module:function such as torch.optim:AdamW.")]
Accumulate = Annotated[int, typer.Option(metavar="N", help="Batches that make one step.")]
Ema = Annotated[float | None, typer.Option(metavar="DECAY", help="Average the weights, such as by 0.999.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="Softens what the dense model teaches.")]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where a stopped fine-tuning is kept; run again, it goes on.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {metadata.version('secateur')}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Prune any PyTorch model to a budget you name, and prove what you got."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the result goes.")] = Path("secateur-demo"),
    as_json: Json = False,
) -> None:
    """Train, prune, recover, export and report a small network on handwritten digits."""
    from secateur.demo import run

    _show(run(out), as_json, out)


@app.command()
def inspect(
    model: Model,
    input: Input = None,
    data: Data = None,
    dense: Dense = None,
    tie: Tie = None,
    free_output: FreeOutput = None,
    as_json: Json = False,
) -> None:
    """Show what can be removed from a model, what it is worth, and why the rest cannot go."""
    from secateur.graph import analyze
    from secateur.opening import opened
    from secateur.report.terminal import axes_of, blocks_of, show_axes, show_blocks

    net, example, _ = opened(model, dense, input, data)
    graph = analyze(net, example, ties=map(_tie, tie or ()), free_outputs=free_output or ())
    if as_json:
        cost = graph.cost()
        weights = [{"weight": w.name, "shape": w.shape, "macs": w.macs} for w in graph.weights.values()]
        places = {"axes": axes_of(graph), "blocks": blocks_of(graph), "weights": weights}
        typer.echo(json.dumps({"params": cost.params, "macs": cost.macs, **places}, indent=1))
    else:
        show_blocks(graph)
        show_axes(graph)


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model, plan and report go.")],
    data: Data = None,
    input: Input = None,
    dense: Dense = None,
    pattern: Pattern = "channel",
    budget: Budget = None,
    criterion: Criterion = None,
    allocate: Annotated[str, typer.Option(help="global, uniform, erk, sensitivity or module:function.")] = "global",
    ignore: Ignore = None,
    override: Override = None,
    minimum: Minimum = None,
    tie: Tie = None,
    free_output: FreeOutput = None,
    reconstruct: Reconstruct = None,
    rounds: Rounds = 1,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning with distillation.")] = 0,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the epochs.")] = 0.01,
    amp: Annotated[bool, typer.Option("--amp", help="Fine-tune in bfloat16 where that is safe.")] = False,
    schedule: Schedule = "cosine",
    optimizer: Optimizer = "sgd",
    accumulate: Accumulate = 1,
    ema: Ema = None,
    temperature: Temperature = 4.0,
    checkpoint: Checkpoint = None,
    verify: Annotated[bool, typer.Option(help="Check that removing equals zeroing.")] = True,
    seed: Annotated[int, typer.Option()] = 0,
    packed: Annotated[bool, typer.Option("--packed", help="Store masked weights without their zeros.")] = False,
    as_json: Json = False,
) -> None:
    """Prune a model to a budget, recover it, and write the model with its report."""
    import secateur as sc
    from secateur.opening import opened
    from secateur.store import require_masks

    require_folder(out)
    if packed:
        require_masks(pattern)
    recovery = {"schedule": schedule, "optimizer": optimizer, "accumulate": accumulate}
    recovery |= {"ema": ema, "temperature": temperature, "checkpoint": checkpoint}
    choice: dict[str, Any] = {"pattern": pattern, "budget": budget, "criterion": criterion, "allocate": allocate}
    training: dict[str, Any] = {"reconstruct": reconstruct, "rounds": rounds, "epochs": epochs, "lr": lr, "amp": amp}
    net, example, task = opened(model, dense, input, data)
    result = sc.prune(
        net,
        sc.analyze(net, example, ties=map(_tie, tie or ()), free_outputs=free_output or ()),
        **choice,
        task=task,
        ignore=tuple(ignore or ()),
        overrides=dict(map(_part, override or ())),
        minimum=dict(map(_least, minimum)) if minimum else 1,
        **training,
        recovery=recovery,
        verify=verify,
        seed=seed,
        source=model,
    )
    sc.save(result, out, packed)
    _show(result.report, as_json, out)


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", help="Model, data, method and training: docs/train-recipe.md.")
    ],
    as_json: Json = False,
) -> None:
    """Prune a model while it trains, as a recipe says; stopped, it goes on when called again."""
    from secateur.train.recipe import read
    from secateur.training import run

    found = read(recipe)
    _show(run(found), as_json, found.out)


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As elsewhere; without one, this machine.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A model to measure side by side, such as the dense one."),
    ] = None,
    input: Input = None,
    data: Data = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="Also lower it, to cpu-sparse or cuda-2:4: the gain, layer by layer."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="How long to time: 5, without a model 30.")] = None,
    linear: Annotated[str, typer.Option(metavar="OUTxIN", help="Without a model: the linear layer.")] = "3072x768",
    conv: Annotated[
        str, typer.Option(metavar="OUTxINxSIZE", help="Without a model: the 3x3 convolution.")
    ] = "128x128x28",
    as_json: Json = False,
) -> None:
    """Measure a model's size, latency, memory and, given data, accuracy; side by side with another one.

    Without a model: from which sparsity on each pattern pays on this machine, and how much.
    """
    import secateur as sc
    from secateur import recipe
    from secateur.graph.trace import run
    from secateur.opening import opened
    from secateur.report import Report
    from secateur.report.compare import compared
    from secateur.runtime.lowering import lowering_of

    if model is None:
        from secateur.report.terminal import show_crossover
        from secateur.runtime.crossover import crossover, sizes

        found = crossover(sizes(linear, 2), sizes(conv, 3), seconds or 30.0)
        typer.echo(json.dumps(asdict(found), indent=1)) if as_json else show_crossover(found)
        return
    net, example, task = opened(model, against, input, data)
    models = {model: net}
    if against is not None:
        models = {against: recipe.load_model(against), model: net}
    for each in models.values():
        run(each, example)  # one that fails on the inputs is named as such
    told = lowering_of(sc.lower(net, example, target=target)).told() if target is not None else ()
    rows, notes = compared(models, example, task, seconds or 5.0)
    _show(Report(f"Measured: {model}", rows, notes=(*notes, *told)), as_json, None)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the exported model goes.")],
    target: Annotated[str, typer.Option(help="onnx")] = "onnx",
    dense: Dense = None,
    input: Input = None,
    data: Data = None,
) -> None:
    """Export a model for a runtime, checked there against eager PyTorch."""
    import secateur as sc
    from secateur.opening import opened

    require_folder(out)
    net, example, _ = opened(model, dense, input, data)
    typer.echo(sc.export(net, example, target, out))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that prune wrote.")],
    as_json: Json = False,
) -> None:
    """Show a report again, and write its HTML page anew from report.json."""
    from secateur.errors import DataError
    from secateur.report import Report

    source = folder / "report.json"
    if not source.is_file():
        raise DataError(f"{source} is not there; expected a directory that `secateur prune --out DIR` wrote")
    found = Report.from_json(source.read_text(encoding="utf-8"))
    found.save_html(folder / "report.html")
    _show(found, as_json, folder)


def main() -> None:
    app()


# --- reading -----------------------------------------------------------------------------------------


def _part(text: str) -> tuple[str, float]:
    """``layer1.*=30%`` as a glob and a fraction."""
    glob, equals, part = text.rpartition("=")
    try:
        value = float(part.removesuffix("%")) / (100 if part.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not (equals and glob and 0 <= value < 1):
        raise SpecError(f"override {text!r} cannot be read; expected GLOB=PART, such as 'layer1.*=30%'")
    return glob, value


def _least(text: str) -> tuple[str, int | float]:
    """``16``, ``25%`` or ``layer1.*=16`` as a glob over axes and a count or a part."""
    glob, _, least = text.rpartition("=")
    try:
        return glob or "*", float(least[:-1]) / 100 if least.endswith("%") else int(least)
    except ValueError:
        raise SpecError(f"minimum {text!r} cannot be read; expected 16, 25% or such as 'layer1.*=16'") from None


def _tie(text: str) -> tuple[str, str]:
    one, equals, other = text.partition("=")
    if not (equals and one and other):
        raise SpecError(f"tie {text!r} cannot be read; expected two places, such as left.weight:0=right.weight:0")
    return one, other


# --- writing -----------------------------------------------------------------------------------------


def _show(report: Report, as_json: bool, folder: Path | None) -> None:
    from secateur.report.terminal import show

    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        show(report, folder)


if __name__ == "__main__":
    main()
