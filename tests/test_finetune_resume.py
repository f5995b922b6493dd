"""A fine-tuning that was killed, at whatever moment, goes on and gives the same weights."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal

import pytest
import torch
from resumed import BATCHES, EPOCHS, OPTIONS, TASKS, blobs, fine_tune, network, noisy, plan, work
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from secateur.errors import DataError
from secateur.recover import recover
from secateur.recover import run as running
from secateur.tasks import Classification


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["secateur.recover", "torch._dynamo"])  # AdamW imports the latter
    return context.Process


@pytest.fixture(scope="module")
def uninterrupted():
    return {(kind, options): fine_tune(kind, options) for kind in TASKS for options in OPTIONS}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


DEATHS = [
    ("batch", 2, 0.0),  # before anything is written
    ("batch", 8, 0.0),
    ("batch", 14, 0.0),
    ("batch", 25, 1e9),  # only ends of epochs are written
    ("validation", 2, 0.0),  # between epochs
    ("write", 1, 0.0),
    ("write", 7, 0.0),
    ("torn", 6, 0.0),
]


@pytest.mark.parametrize(("kind", "options"), [("numbered", "adamw"), ("own", "sgd")])
def test_a_killed_run_ends_as_one_that_was_not(processes, uninterrupted, tmp_path, kind, options):
    """Killed once at each of these moments, each time in a folder of its own."""
    for number, (moment, count, every) in enumerate(DEATHS):
        folder = tmp_path / str(number)
        process = processes(target=work, args=(kind, options, folder, every, tmp_path / "out", moment, count))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, moment
        assert same(fine_tune(kind, options, folder), uninterrupted[kind, options]), (moment, count)
        assert [file.name for file in folder.iterdir()] == ["recover.safetensors"]


def test_killed_again_and_again_at_any_time(processes, uninterrupted, tmp_path):
    kind, options = "ours", "sgd"
    draw, deaths, patience = random.Random(0), 0, 0.005
    while not (tmp_path / "out").exists():
        process = processes(target=work, args=(kind, options, tmp_path / "run", 0.0, tmp_path / "out", "", 0))
        process.start()
        process.join(draw.uniform(0, patience))
        process.kill()
        process.join(60)
        deaths += process.exitcode != 0
        patience *= 1.2  # until it is enough on this machine to come to the end
    assert same(load_file(tmp_path / "out"), uninterrupted[kind, options])
    assert deaths


def test_keeping_a_checkpoint_changes_nothing(uninterrupted, tmp_path):
    for (kind, options), expected in uninterrupted.items():
        assert same(fine_tune(kind, options, tmp_path / f"{kind}-{options}"), expected)


def test_a_finished_run_returns_at_once(uninterrupted, tmp_path, monkeypatch):
    fine_tune("ours", "sgd", tmp_path)
    monkeypatch.setattr(running, "evaluate", None)
    monkeypatch.setattr(running.Run, "step", None)
    assert same(fine_tune("ours", "sgd", tmp_path), uninterrupted["ours", "sgd"])


def test_a_run_that_lost_its_patience_has_finished(tmp_path, monkeypatch):
    x, y = blobs(160, 0)
    task = Classification((x, (y + 1) % 3), (x, y), (x, y))
    good, _ = recover(network(0), Classification((x, y), (x, y), (x, y)), lr=0.1)
    first = recover(good, task, epochs=9, patience=2, checkpoint=tmp_path)
    assert len(first[1]) == 2
    monkeypatch.setattr(running.Run, "step", None)
    again = recover(good, task, epochs=9, patience=2, checkpoint=tmp_path)
    assert again[1] == first[1]
    assert same(again[0].state_dict(), first[0].state_dict())


def test_what_is_done_is_not_made_again_where_batches_have_numbers(tmp_path, monkeypatch):
    made = []

    def counted(x, generator):
        made.append(len(x))
        return noisy(x, generator)

    def task():
        return Classification(blobs(160, 0), blobs(60, 1), blobs(60, 2), batch_size=16, augment=counted)

    def interrupted(run):
        if run.at.batch:
            raise KeyboardInterrupt
        return validate(run)

    validate = running.Run.validate
    monkeypatch.setattr(running.Run, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(network(0), task(), epochs=1, checkpoint=tmp_path, every=0.0)
    monkeypatch.setattr(running.Run, "validate", validate)
    made.clear()
    recover(network(0), task(), epochs=1, checkpoint=tmp_path, every=0.0)
    assert len(made) == 2  # the two looks at the first batch that tell whether it is the same data


# --- refusals ---------------------------------------------------------------------------------------


def other(**changes):
    """A finished run's arguments, but for ``changes``."""
    x, y = blobs(160, 0)
    arguments = {
        "model": network(0),
        "task": Classification((x, y), blobs(60, 1), blobs(60, 2), batch_size=16),
        "plan": plan(),
        "teacher": network(7),
        "epochs": 1,
    } | changes
    return recover(arguments.pop("model"), arguments.pop("task"), **arguments)


def partly_frozen():
    model = network(0)
    model[4].bias.requires_grad_(False)
    return model


class Renamed(Classification):
    pass


X, Y = blobs(160, 0)
SPLITS = {"validation": blobs(60, 1), "test": blobs(60, 2), "batch_size": 16}
CHANGES = {
    r"epochs was 1, is now 2": {"epochs": 2},
    r"lr was 0\.01, is now 0\.1": {"lr": 0.1},
    r"accumulate was 1, is now 2": {"accumulate": 2},
    r"ema was None, is now 0\.9": {"ema": 0.9},
    r"seed was 0, is now 1": {"seed": 1},
    r"amp was None, is now torch\.bfloat16": {"amp": True},
    r"schedule was \[0\.0": {"schedule": lambda done: 1.0},
    r"optimizer was SGD .*, is now Adam ": {"optimizer": torch.optim.Adam},
    r"model was Sequential \w{12} \w{12}, is now Sequential \w{12} \w{12}\.": {"model": network(1)},
    r"model was Sequential \w{12} \w{12}, is now Sequential": {"model": partly_frozen()},
    r"teacher was Sequential \w{12}, is now Sequential": {"teacher": network(1)},
    r"teacher was Sequential \w{12}, is now None": {"teacher": None},
    r"plan was \w{12}, is now None": {"plan": None},
    r"task was Classification, is now Renamed": {"task": Renamed((X, Y), **SPLITS)},
    r"data was \w{12} \w{12}, is now": {"task": Classification((X, 2 - Y), **SPLITS)},
    r"data was .*another folder, or delete it": {"task": Classification((X, Y), **SPLITS | {"validation": (X, Y)})},
}


@pytest.mark.parametrize("message", CHANGES)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, message):
    other(checkpoint=tmp_path)
    before = (tmp_path / "recover.safetensors").read_bytes()
    with pytest.raises(DataError, match=f"holds the checkpoint of another run: .*{message}"):
        other(checkpoint=tmp_path, **CHANGES[message])
    assert (tmp_path / "recover.safetensors").read_bytes() == before


def test_the_folder_and_how_often_it_is_written_do_not_matter(tmp_path):
    model, _ = other(checkpoint=tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    again, _ = other(checkpoint=tmp_path / "b", every=1.0)
    assert same(model.state_dict(), again.state_dict())


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file is a file, expected a folder"):
        other(checkpoint=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("damage", [b"", b"no tensors", lambda raw: raw[:-10], lambda raw: raw.replace(b"at", b"xx")])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    other(checkpoint=tmp_path)
    file = tmp_path / "recover.safetensors"
    file.write_bytes(damage if isinstance(damage, bytes) else damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"recover\.safetensors is damaged, or no checkpoint of recover .*delete it"):
        other(checkpoint=tmp_path)


def test_a_newer_format_is_named(tmp_path):
    other(checkpoint=tmp_path)
    file = tmp_path / "recover.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["recover"])
    assert header["version"] == 1
    file.write_bytes(file.read_bytes().replace(rb"{\"version\": 1", rb"{\"version\": 9"))
    with pytest.raises(DataError, match="is of format 9, this Secateur continues 1"):
        other(checkpoint=tmp_path)


def test_a_task_that_does_not_repeat_itself_cannot_be_continued(tmp_path):
    class Restless(Classification):
        def batches(self, split):
            for x, y in super().batches(split):
                yield x + torch.rand(1, generator=own), y

    own = torch.Generator()
    task = Restless(blobs(160, 0), blobs(60, 1), blobs(60, 2))
    recover(network(0), task, epochs=1)
    with pytest.raises(DataError, match=r"Restless gives other training batches each time.*global random state"):
        recover(network(0), task, epochs=1, checkpoint=tmp_path)


def test_an_optimizer_state_that_is_no_data_is_named(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["hook"] = print

    with pytest.raises(DataError, match="holds a builtin_function_or_method at /optimizer/0/hook"):
        recover(nn.Linear(4, 3), other_task(), epochs=1, optimizer=Odd, checkpoint=tmp_path)


def other_task():
    return Classification(blobs(160, 0), blobs(60, 1), blobs(60, 2))


def test_the_numbers_here_fit_the_runs():
    assert len(list(TASKS["ours"]().batches("train"))) == BATCHES
    assert all(options["epochs"] == EPOCHS for options in OPTIONS.values())
