"""``secateur train``: recipes are read strictly, every method is walked to its budget, and stopped runs go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from resumed import blobs
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.demo import DigitNet
from secateur.errors import DataError, PlanError, PruneError
from secateur.graph import analyze
from secateur.recover import Epoch, Recovery
from secateur.report import Report
from secateur.tasks import Classification
from secateur.train import ACDC, Gradual
from secateur.train.logs import logging
from secateur.train.recipe import methods, read
from secateur.train.run import train

WHOLE = """
out = "out"
log = ["tensorboard"]

[model]
name = "secateur.demo:DigitNet"
input = "1x1x8x8"

[data]
name = "digits"

[method]
name = "acdc"
pattern = "unstructured"
budget = "sparsity=80%"
criterion = "magnitude"
allocate = "erk"
ignore = ["stem.*"]
warmup = 0.2

[train]
epochs = 3
lr = 0.1
schedule = "rewind"
optimizer = { name = "torch.optim:AdamW", weight_decay = 0.1 }
batch = 32
accumulate = 2
clip = 1
ema = 0.9
amp = "bf16"
seed = 4
teacher = true
temperature = 2
alpha = 0.5
every = 60
"""


def written(text: str, folder: Path) -> Path:
    path = folder / "r.toml"
    path.write_text(text)
    return path


# --- reading ----------------------------------------------------------------------------------------


def test_a_recipe_says_everything(tmp_path):
    found = read(written(WHOLE, tmp_path))
    assert (found.out, found.log) == (Path("out"), ("tensorboard",))
    assert (found.model, found.dense) == ("secateur.demo:DigitNet", None)
    assert (found.input, found.data, found.batch, found.teacher) == ("1x1x8x8", "digits", 32, True)
    assert found.method.kind is ACDC
    common = {"pattern": "unstructured", "budget": "sparsity=80%", "criterion": "magnitude", "allocate": "erk"}
    assert found.method.arguments == {**common, "ignore": ["stem.*"], "warmup": 0.2}
    how = found.how
    assert (how.epochs, how.lr, how.schedule, how.accumulate, how.clip, how.ema) == (3, 0.1, "rewind", 2, 1, 0.9)
    assert (how.amp, how.seed, how.temperature, how.alpha, how.every) == ("bf16", 4, 2, 0.5, 60)
    assert how.checkpoint == Path("out/checkpoint")
    optimizer = how.factory()([nn.Parameter(torch.zeros(1))], lr=how.lr)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["weight_decay"] == 0.1


def test_what_is_left_out_has_defaults(tmp_path):
    short = 'out="o"\n[model]\nname="a:b"\n[data]\nname="d"\n[method]\nname="asp"\n[train]\nepochs=1'
    found = read(written(short, tmp_path))
    assert (found.input, found.dense, found.log, found.batch, found.teacher) == (None, None, (), None, False)
    assert found.method.arguments == {}
    assert found.how == Recovery(epochs=1, checkpoint=Path("o/checkpoint"))


def test_the_recipes_of_the_documentation_can_be_read(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "train-recipe.md"
    blocks = re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert [read(written(block, tmp_path)).method.kind for block in blocks] == [Gradual, Gradual]


def test_every_method_has_a_name():
    assert {"gradual", "acdc", "rigl", "softmovement", "l0"} <= methods().keys()
    assert "pruner" not in methods()
    assert methods()["gradual"] is Gradual


MISTAKES = {
    r"r\.toml is no TOML: .*line 2": ('out = "out"', "out = out"),
    r"r\.toml: unknown key 'modle', did you mean 'model'\? expected any of data, log, method, model, out, train": (
        "[model]",
        "[modle]",
    ),
    r"r\.toml: out is missing, expected the folder for the result": ('out = "out"', ""),
    r"r\.toml: out is 3, expected the folder": ('out = "out"', "out = 3"),
    r"r\.toml: data is missing, expected a table \[data\]": ('[data]\nname = "digits"', ""),
    r"r\.toml: log is \['tensorbord'\], expected any of tensorboard, mlflow": ("tensorboard", "tensorbord"),
    r"r\.toml: \[data\] name is missing, expected a name in quotes": ('name = "digits"', ""),
    r"r\.toml: \[model\] unknown key 'imput', did you mean 'input'\?": ("input =", "imput ="),
    r"\[method\] name is 'acdx', expected 'acdc', or another of .*gradual.*, or module:Class": ('"acdc"', '"acdx"'),
    r"\[method\] name: there is no module 'nowhere'": ('"acdc"', '"nowhere:Class"'),
    r"\[method\] name is 'torch\.nn:Linear', expected a class made from secateur\.train\.Pruner": (
        '"acdc"',
        '"torch.nn:Linear"',
    ),
    r"\[method\] unknown key 'warmpu', did you mean 'warmup'\?": ("warmup", "warmpu"),
    r"\[method\] unknown key 'steps', .*expected any of allocate, budget": ("warmup = 0.2", "steps = 3"),
    r"\[method\] unknown key 'graph'": ("warmup = 0.2", "graph = 3"),
    r"\[method\] warmup is '0\.2', expected a number": ("0.2", '"0.2"'),
    r"\[method\] warmup is true, expected a number": ("0.2", "true"),
    r"\[method\] schedule is 'soon', expected what fits Iterable\[tuple\[int, str \| None\]\]": (
        "warmup = 0.2",
        'schedule = "soon"',
    ),
    r"\[method\] schedule is \[\[1\.5": ("warmup = 0.2", 'schedule = [[1.5, "sparsity=80%"]]'),
    r"\[method\] pattern: pattern '2of4'": ('"unstructured"', '"2of4"'),
    r"\[method\] budget: budget 'latency=5ms' has no way to it": ('"sparsity=80%"', '"latency=5ms"'),
    r"\[method\] budget is 0\.8, expected a text in quotes": ('"sparsity=80%"', "0.8"),
    r"\[method\] criterion: .*'magnitud'": ('"magnitude"', '"magnitud"'),
    r"\[method\] allocate: .*'erc'": ('"erk"', '"erc"'),
    r"\[method\] ignore is \[3\], expected names or globs": ('["stem.*"]', "[3]"),
    r"\[train\] unknown key 'epoch', did you mean 'epochs'\?": ("epochs = 3", "epoch = 3"),
    r"\[train\] unknown key 'checkpoint'": ("every = 60", 'checkpoint = "x"'),
    r"\[train\] epochs is 0, expected a whole number, 1 or more": ("epochs = 3", "epochs = 0"),
    r"\[train\] epochs is missing": ("epochs = 3", ""),
    r"\[train\]: lr is 'high', expected a number above 0": ("lr = 0.1", 'lr = "high"'),
    r"\[train\] schedule: schedule 'sine' is unknown; there are cosine, rewind": ('"rewind"', '"sine"'),
    r"\[train\] optimizer: .*unexpected keyword argument 'weight_decoy'": ("weight_decay", "weight_decoy"),
    r"\[train\] optimizer: optimizer 'adam' is unknown; there are sgd": ("torch.optim:AdamW", "adam"),
    r"\[train\] optimizer: found 3, expected a name, or": (
        'optimizer = { name = "torch.optim:AdamW", weight_decay = 0.1 }',
        "optimizer = 3",
    ),
    r"\[train\] batch is 0, expected a whole number of examples": ("batch = 32", "batch = 0"),
    r"\[train\] teacher is 'dense', expected true or false": ("teacher = true", 'teacher = "dense"'),
    r"\[train\] alpha is 0\.5, expected teacher = true besides": ("teacher = true", ""),
    r"\[train\]: amp is 'fp8', expected False, True, 'bf16' or 'fp16'": ("bf16", "fp8"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_a_recipe_is_named(tmp_path, message):
    old, new = MISTAKES[message]
    assert WHOLE.count(old) >= 1
    with pytest.raises(PruneError, match=message) as caught:
        read(written(WHOLE.replace(old, new), tmp_path))
    assert str(caught.value).startswith(str(tmp_path / "r.toml"))


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none\.toml cannot be read: No such file or directory; expected a recipe"):
        read(tmp_path / "none.toml")


# --- the loop ---------------------------------------------------------------------------------------

STEPS = 12
"""Of an epoch of the task below."""


def task(kind=Classification, **changes):
    parts = {"train": blobs(96, 0), "validation": blobs(60, 1), "test": blobs(60, 2), "batch_size": 8}
    return kind(**(parts | changes))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def trained(kind=Gradual, data=None, wishes=None, **options):
    """A training of the small network; ``wishes`` are the method's."""
    wishes = {"budget": "sparsity=75%", **(wishes or {})}
    model = net()
    graph = analyze(model.eval(), blobs(2, 0)[0])

    def make(model, optimizer, steps, average):
        return kind(model, optimizer, steps=steps, graph=graph, average=average, **wishes)

    how = Recovery(**({"epochs": 2, "lr": 0.05} | options))
    return train(model, data or task(), make, how, about={"method": kind.__name__})


class Scripted(Classification):
    """Validation scores as they stand in ``script``, epoch by epoch."""

    script: ClassVar[list[float]] = []

    def scores(self, output, target):
        return torch.full((len(target),), Scripted.script.pop(0))


def scripted(*scores):
    Scripted.script = list(scores)
    return task(Scripted, validation=blobs(8, 1))


CONSTANT = {"schedule": lambda done: 1.0}


def test_the_best_epoch_counts_once_the_budget_is_reached():
    wishes = {"begin": 0, "end": 2 * STEPS, "every": 6}
    found = trained(data=scripted(9, 1, 3, 2), wishes=wishes, epochs=4, **CONSTANT)
    assert (found.chosen, found.ended) == (3, 2)
    assert [epoch.validation for epoch in found.history] == [9, 1, 3, 2]
    three = trained(data=scripted(0, 0, 1), wishes=wishes, epochs=3, **CONSTANT)
    assert same(found.model.state_dict(), three.model.state_dict())


def test_the_last_epoch_counts_where_the_budget_is_reached_in_it():
    found = trained(data=scripted(3, 2, 1), wishes={"end": 3 * STEPS}, epochs=3)
    assert (found.chosen, found.ended) == (3, 3)
    weights = [p for p in found.model.parameters() if p.ndim > 1]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == 0.75 * sum(w.numel() for w in weights)


def test_the_history_has_the_part_of_zeros():
    found = trained(wishes={"begin": 0, "end": STEPS, "every": 6}, epochs=3)
    assert [epoch.sparsity for epoch in found.history] == [0.75] * 3
    dense = trained(wishes={"schedule": [(3 * STEPS, "sparsity=75%")]}, epochs=3)
    assert [epoch.sparsity for epoch in dense.history] == [0, 0, 0.75]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_model_that_comes_back_has_the_zeros_of_the_plan(ema):
    found = trained(wishes={"end": STEPS + 5}, epochs=2, ema=ema, clip=0.5, accumulate=1)
    for name, keep in found.plan.masks.items():
        weight = found.model.get_parameter(name)
        assert (weight[~keep] == 0).all()
        assert (weight[keep] != 0).any()
    assert sum(int((~k).sum()) for k in found.plan.masks.values()) == 0.75 * sum(
        k.numel() for k in found.plan.masks.values()
    )


def test_a_schedule_after_the_last_step_is_no_dense_result_in_silence():
    class Late(Gradual):
        def step(self):
            return False

    with pytest.raises(PlanError, match="train on, or make the method with fewer steps"):
        trained(Late)


class Steep(Classification):
    def loss(self, output, target):
        return 300 * super().loss(output, target)  # overflows in fp16 at the scaler's first scales


def test_steps_that_overflow_are_made_again_so_that_the_schedule_ends():
    applied = []

    class Counted(Gradual):
        def step(self):
            applied.append(self.applied)
            return super().step()

    found = trained(Counted, data=task(Steep), wishes={"end": 2 * STEPS}, amp="fp16", lr=1e-4)
    assert applied == list(range(1, 2 * STEPS + 1))
    assert found.history[-1].sparsity == 0.75


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Classification):
    """Stops the process's work at a call of the loss."""

    left = -1

    def loss(self, output, target):
        Stopped.left -= 1
        if not Stopped.left:
            raise KeyboardInterrupt
        return super().loss(output, target)


CHANNELS = {"pattern": "channel", "budget": "params=60%"}
WISHES = {
    "asp": {"budget": "sparsity=50%"},
    "l0": {"budget": "sparsity=40%"},
    "srste": {"pattern": "2:4", "budget": None},
    "set": {"every": 4},
    "rigl": {"every": 4},
    "acdc": {"warmup": 0.2, "phase": 0.1},
    "grouplasso": CHANNELS,
    "growingreg": CHANNELS,
    "slimming": CHANNELS,
    "proximal": CHANNELS,
}


@pytest.mark.parametrize("name", methods())
def test_every_method_ends_as_if_it_had_not_been_stopped(name, tmp_path):
    kind, wishes = methods()[name], WISHES.get(name, {})
    options = {"ema": 0.9, "clip": 1.0}
    whole = trained(kind, task(Stopped), wishes, **options)
    Stopped.left = STEPS + 4  # in the second epoch
    with pytest.raises(KeyboardInterrupt):
        trained(kind, task(Stopped), wishes, checkpoint=tmp_path, every=0.0, **options)
    Stopped.left = -1
    again = trained(kind, task(Stopped), wishes, checkpoint=tmp_path, every=0.0, **options)
    assert same(again.model.state_dict(), whole.model.state_dict())
    assert same(again.plan.masks, whole.plan.masks)
    assert same(again.plan.units, whole.plan.units)
    assert (again.chosen, again.ended) == (whole.chosen, whole.ended)


def test_a_finished_run_comes_back_without_a_step(tmp_path):
    first = trained(data=task(Stopped), epochs=1, checkpoint=tmp_path)
    Stopped.left = 1
    again = trained(data=task(Stopped), epochs=1, checkpoint=tmp_path)
    assert Stopped.left == 1
    Stopped.left = -1
    assert same(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history


def test_another_method_does_not_go_on_with_the_checkpoint(tmp_path):
    trained(checkpoint=tmp_path)
    with pytest.raises(DataError, match="checkpoint of another run: method was Gradual, is now ACDC"):
        trained(ACDC, wishes={"warmup": 0.2, "phase": 0.1}, checkpoint=tmp_path)


# --- logs -------------------------------------------------------------------------------------------

EPOCHS = [Epoch(0.5, 0.25, 1.0, 0.1, 0.0), Epoch(0.25, 0.5, 1.0, 0.05, 0.75)]


def told(names, folder):
    with logging(names, folder, "title", {"epochs": 2}) as tell:
        for number, epoch in enumerate(EPOCHS, start=1):
            tell(number, epoch)


def test_tensorboard_gets_every_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told(["tensorboard"], tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("sparsity")] == [(1, 0.0), (2, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


class FakeMLflow(types.ModuleType):
    """Those calls of MLflow that are made, with its own signatures."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.params, self.metrics = [], [], []

    def start_run(self, run_id=None, run_name=None):
        self.runs.append((run_id, run_name))
        info = types.SimpleNamespace(run_id="r1")

        class Run:
            def __enter__(self):
                return types.SimpleNamespace(info=info)

            def __exit__(self, *_):
                return None

        return Run()

    def log_params(self, params):
        self.params.append(params)

    def log_metrics(self, metrics, step):
        self.metrics.append((step, metrics["validation"]))


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    told(["mlflow"], tmp_path)
    told(["mlflow"], tmp_path)
    assert fake.runs == [(None, "title"), ("r1", None)]
    assert fake.params == [{"epochs": 2}]
    assert fake.metrics == 2 * [(1, 0.25), (2, 0.5)]


def test_a_log_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    fake = FakeMLflow()
    monkeypatch.setattr(fake, "start_run", lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    with pytest.raises(DataError, match="the log mlflow could not be opened: ZeroDivisionError"):
        told(["mlflow"], tmp_path)


# --- the command ------------------------------------------------------------------------------------

DIGITS = """
out = "out"

[model]
name = "secateur.demo:DigitNet"

[data]
name = "digits"

[method]
name = "gradual"
budget = "sparsity=80%"
end = 30

[train]
epochs = 3
lr = 0.05
every = 0
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def secateur(*words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_killed_and_called_again_the_command_ends_as_if_it_had_not_been(here):
    written(DIGITS, here)
    command = [sys.executable, "-m", "secateur.cli", "train", "r.toml"]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=threads, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not Path("out/checkpoint/recover.safetensors").exists() and process.poll() is None:
        assert time.monotonic() - began < 120
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not Path("out/model.json").exists()

    report = json.loads(secateur("train", "r.toml", "--json"))
    assert report == json.loads(Path("out/report.json").read_text())
    (here / "other.toml").write_text(DIGITS.replace('"out"', '"other"'))
    secateur("train", "other.toml")
    assert same(load_file("out/model.safetensors"), load_file("other/model.safetensors"))

    # What came of it.
    assert [row["stage"] for row in report["rows"]] == ["dense", "trained"]
    assert report["rows"][1]["drop"] is not None
    assert [epoch["sparsity"] for epoch in report["history"]][1:] == [0.8, 0.8]
    assert "best validation score from epoch 2 on" in report["notes"][0]
    page = Path("out/report.html").read_text()
    assert all(f'id="epoch-{line}"' in page for line in ("loss", "score", "zeros"))
    plan = sc.Plan.load("out")
    assert plan.meta["method"] == "Gradual"
    model = sc.load("out", DigitNet())
    assert all((model.get_parameter(name)[~keep] == 0).all() for name, keep in plan.masks.items())
    assert Report.from_json(Path("out/report.json").read_text()).history[0].loss == report["history"][0]["loss"]


def test_channels_are_shrunk_and_batches_have_the_recipes_size(here):
    changed = DIGITS.replace('budget = "sparsity=80%"', 'pattern = "channel"\nbudget = "macs=60%"')
    changed = changed.replace("every = 0", "batch = 128\nteacher = true\nalpha = 0.5").replace("end = 30", "end = 10")
    written(changed, here)
    report = json.loads(secateur("train", "r.toml", "--json"))
    assert report["rows"][1]["macs"] <= 0.6 * report["rows"][0]["macs"]
    assert report["law"]["error"] <= report["law"]["tolerance"]
    assert (report["meta"]["batch"], report["meta"]["teacher"]) == ("128", "dense, alpha 0.5, temperature 4")
    model = sc.load("out", DigitNet())
    assert sum(p.numel() for p in model.parameters()) == report["rows"][1]["params"]


OWN = """
import torch
from torch import nn
from secateur.tasks import Classification

def data():
    x, y = torch.randn(48, 8), torch.arange(48) % 4
    return Classification((x, y), (x, y), (x, y))

class Bare:
    def __init__(self):
        self.of = data()
        self.batches, self.loss, self.scores = self.of.batches, self.of.loss, self.of.scores

def normed():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
"""


def recipe(data="own.py:data", model="own.py:normed", method='name = "gradual"\nbudget = "sparsity=50%"', more=""):
    return f"""
out = "out"
[model]
name = "{model}"
[data]
name = "{data}"
[method]
{method}
[train]
epochs = 1
{more}
"""


CHANNEL = 'name = "gradual"\npattern = "channel"\nbudget = "macs=60%"'
REFUSED = {
    r"r.toml: [model] and [data]: model 'resnet' is none of": recipe(model="resnet"),
    r"r.toml: [model] and [data]: there is no data 'nowhere'": recipe(data="nowhere"),
    r"r.toml: [train] batch is 8, and a Bare has no batch_size": recipe(data="own.py:Bare", more="batch = 8"),
    r"r.toml: [method]: channels train as zeros": recipe(method=CHANNEL),
    r"r.toml: [method]: the schedule runs from step 0 to 40 of 1;": recipe(
        method='name = "gradual"\nbudget = "sparsity=50%"\nbegin = 0\nend = 40'
    ),
    r"r.toml: [method]: ignore 'nothing' matches nothing": recipe(
        method='name = "gradual"\nbudget = "sparsity=50%"\nignore = "nothing"'
    ),
    r"r.toml: [method] unknown key 'budgte'": recipe(method='name = "gradual"\nbudgte = "sparsity=50%"'),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_mistake_is_one_line_and_exit_code_2(here, message):
    (here / "own.py").write_text(OWN)
    written(REFUSED[message], here)
    result = CliRunner().invoke(app, ["train", "r.toml"])
    assert result.exit_code == 2, result.output
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"secateur: {message}")
    assert not Path("out").exists()


def test_help_loads_no_torch():
    code = """
import sys
from secateur.cli import app
try:
    app(prog_name="secateur")
except SystemExit as exit:
    assert not exit.code, exit.code
assert "torch" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code, "train", "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "RECIPE.toml" in run.stdout


def test_a_missing_package_is_named_before_anything_is_trained(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    (here / "own.py").write_text(OWN)
    written('log = "mlflow"\n' + recipe(), here)
    result = CliRunner().invoke(app, ["train", "r.toml"])
    assert result.exit_code == 2
    assert "pip install 'secateur[log]'" in result.stderr
    assert not Path("out").exists()
