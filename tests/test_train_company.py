"""What training methods meet: other processes, mixed precision, accumulation, averages, compilers, copies, restarts."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import company
import pytest
import torch
from company import KINDS, METHODS, STEPS, STOP, loss_of, refused, started, steps
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur import train
from secateur.train import Pruner

ROOT = Path(__file__).resolve().parents[1]
METHOD = pytest.mark.parametrize("method", METHODS)
COMPANY = pytest.mark.parametrize("method", [m for m in METHODS if not refused(m, "FSDP2")])


def adam(model):
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def masked(model, pruner):
    """Whether the model's tensors are zero wherever masks say so."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return bool(pruner.bits) and not any(bool(named[name][~pruner.mask(name)].any()) for name in pruner.bits)


def test_the_table_has_every_method_and_is_that_of_these_tests() -> None:
    public = {name: getattr(train, name) for name in train.__all__}
    methods = {name for name, found in public.items() if isinstance(found, type) and issubclass(found, Pruner)}
    assert {method.split(",")[0] for method in METHODS} == methods - {"Pruner"}
    page = (ROOT / "docs" / "training.md").read_text()
    shown = page.split("<!-- interplay -->\n")[1].split("<!-- end -->")[0].strip()
    assert shown == company.table(), "put company.table() between the marks"
    tests = Path(__file__).read_text()
    assert all(f"# {kind}\n" in tests for kind in KINDS)


# --- two processes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each of two processes says of each method."""
    folder = tmp_path_factory.mktemp("company")
    both = [subprocess.Popen([sys.executable, company.__file__, str(rank), str(folder)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=170) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def agree(together, method, kind, like="alone"):
    """Both processes have the same masks as one alone has with all the batch, and the same weights but for rounding."""
    (mine, theirs), alone = (found[method][kind] for found in together), together[0][method][like]
    assert mine == theirs
    assert mine["masks"] == alone["masks"]
    assert mine["steps"] == STEPS
    assert mine["sparsity"] == alone["sparsity"] > 0.2
    assert mine["weights"] == pytest.approx(alone["weights"], rel=1e-9, abs=1e-9)


# DDP
@METHOD
def test_two_processes_choose_as_one(together, method: str) -> None:
    agree(together, method, "ddp")


# FSDP2
@METHOD
def test_two_processes_that_share_weights_choose_as_one(together, method: str) -> None:
    if refused(method, "FSDP2"):
        assert all("channels are removed whole" in found[method]["refused"] for found in together)
        return
    agree(together, method, "fsdp2")
    for found in together:
        assert found[method]["plan"] == round((1 - found[method]["fsdp2"]["sparsity"]) * 429)
        assert found[method]["zeros"] >= 429 - found[method]["plan"]


# other world size
@COMPANY
@pytest.mark.parametrize("kind", ["one to two", "two to one"])
def test_a_training_goes_on_with_another_number_of_processes(together, method: str, kind: str) -> None:
    agree(together, method, kind)


# --- one process -----------------------------------------------------------------------------------


# AMP
@METHOD
def test_autocast_trains_float32_weights_with_exact_zeros(method: str) -> None:
    model, optimizer, pruner = started(method, dtype=torch.float32)
    for step in range(STEPS):
        x, y = company.batch(step, torch.float32)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        if pruner.step():
            assert masked(model, pruner) or not pruner.bits  # a dense phase has none
    assert masked(model, pruner)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    alone = started(method)
    steps(*alone, range(STEPS))
    assert pruner.sparsity == pytest.approx(alone[2].sparsity, abs=0.1 if "channel" in method else 0.02)


# AMP
@METHOD
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out_is_none(method: str, fused: bool) -> None:
    def optimizer(model):
        return torch.optim.AdamW(model.parameters(), 0.01, fused=fused)

    model, chosen, pruner = started(method, optimizer=optimizer, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in [*range(5), -1, *range(5, STEPS)]:
        x, y = company.batch(max(step, 0), torch.float32)
        chosen.zero_grad()
        loss = loss_of(model, x, y) * (torch.inf if step < 0 else 1)
        scaler.scale(loss).backward()
        scaler.step(chosen)
        scaler.update()
        assert not (pruner.step() and step < 0)
    plain = started(method, optimizer=optimizer, dtype=torch.float32)
    steps(*plain, range(STEPS))
    assert pruner.applied == STEPS
    assert same(model, plain[0])


# accumulation
@METHOD
def test_gradients_of_small_batches_add_up_to_those_of_a_large_one(method: str) -> None:
    model, optimizer, pruner = started(method)
    for step in range(STEPS):
        x, y = company.batch(step)
        optimizer.zero_grad()
        for part in range(4):
            (loss_of(model, x[part::4], y[part::4]) / 4).backward()
        optimizer.step()
        pruner.step()
    alone = started(method)
    steps(*alone, range(STEPS))
    assert company.outcome(model, pruner)["masks"] == company.outcome(alone[0], alone[2])["masks"]
    for one, other in zip(model.parameters(), alone[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# EMA
@METHOD
@pytest.mark.parametrize("wrapped", [True, False])
def test_averages_have_the_same_zeros(method: str, wrapped: bool) -> None:
    model = company.network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if wrapped else copy.deepcopy(model)
    inner = average.module if wrapped else average
    optimizer = company.sgd(model)
    pruner = company.made(method, model, optimizer, average=average)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, *company.batch(step)).backward()
        optimizer.step()
        if pruner.step():
            assert masked(inner, pruner) or not pruner.bits
        if wrapped:
            average.update_parameters(model)
        else:
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
    pruner.finish()
    assert masked(inner, pruner)
    kept = inner[0].weight[pruner.mask("0.weight")]
    assert bool(kept.any())
    assert not torch.equal(inner[0].weight, model[0].weight)


# compile
@METHOD
def test_one_compiled_graph_lasts_the_training(method: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = company.network()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = company.sgd(run)
    pruner = company.made(method, run, optimizer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps(model, optimizer, pruner, range(STEPS), run=run)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert masked(model, pruner)
    plain = started(method)
    steps(*plain, range(STEPS))
    assert company.outcome(model, pruner)["masks"] == company.outcome(plain[0], plain[2])["masks"]


# deepcopy
@METHOD
def test_a_copy_goes_on_alike_and_by_itself(method: str) -> None:
    first = started(method, optimizer=adam)
    steps(*first, range(STOP))
    alone, second = copy.deepcopy(first[0]), copy.deepcopy(first)
    steps(*second, range(STOP, STEPS))
    assert same(first[0], alone)
    assert first[2].applied == STOP
    steps(*first, range(STOP, STEPS))
    assert same(first[0], second[0])
    assert first[2].bits.keys() == second[2].bits.keys()
    assert all(torch.equal(bits, second[2].bits[name]) for name, bits in first[2].bits.items())


# resume
@METHOD
@pytest.mark.parametrize("stop", [1, 4, 6, 9])
def test_a_training_resumes_to_the_bit(method: str, stop: int) -> None:
    first = started(method, optimizer=adam, dtype=torch.float32)
    steps(*first, range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    steps(*first, range(stop, STEPS))

    file.seek(0)
    second = started(method, optimizer=adam, dtype=torch.float32)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    steps(*second, range(stop, STEPS))
    assert same(first[0], second[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = first[2].finish(), second[2].finish()
    assert not one.diff(other)
    assert one.meta == other.meta
    assert same(first[0], second[0])
    assert isinstance(first[0][0], nn.Linear)
