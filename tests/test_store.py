"""A saved directory: what comes back is what went in, and nothing hostile gets through."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nets import build
from secateur import api, store
from secateur.errors import DataError, PlanError, PruneError


def saved(tmp_path, net="plain", **wishes):
    model, inputs = build(net)
    result = api.prune(model, inputs, **({"budget": "params=60%"} | wishes))
    store.save(result, tmp_path / "out")
    return model, inputs, result, tmp_path / "out"


@pytest.mark.parametrize("net", ["plain", "option_a_shortcut", "grouped_queries", "tied_linear", "two_outputs"])
def test_save_and_load_is_identity(net, tmp_path):
    model, inputs, result, folder = saved(tmp_path, net)
    loaded = store.load(folder, build(net, seed=9)[0])  # its weights do not matter
    assert loaded.state_dict().keys() == result.model.state_dict().keys()
    for key, value in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    out = torch.utils._pytree.tree_leaves(loaded(inputs))
    for a, b in zip(out, torch.utils._pytree.tree_leaves(result.model.eval()(inputs)), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in loaded.parameters())


def test_masked_models_come_back_with_their_zeros(tmp_path):
    model, inputs, result, folder = saved(tmp_path, pattern="unstructured", budget="sparsity=80%")
    loaded = store.load(folder, model)
    assert torch.equal(loaded(inputs), result.model(inputs))
    assert int((loaded.get_parameter("3.weight") == 0).sum()) >= int((~result.plan.masks["3.weight"]).sum())


def test_ties_survive_and_are_stored_once(tmp_path):
    *_, folder = saved(tmp_path, "tied_linear")
    assert "head.weight" not in load_file(folder / "model.safetensors")
    loaded = store.load(folder, build("tied_linear")[0])
    assert loaded.head.weight is loaded.emb.weight


def test_inputs_are_kept(tmp_path):
    _, inputs, _, folder = saved(tmp_path)
    assert torch.equal(store.saved_inputs(folder)[0], inputs)


def test_keyword_inputs_are_kept(tmp_path):
    model, x = build("plain")
    result = api.prune(model, {"input": x}, budget="params=60%")
    store.save(result, tmp_path / "out")
    assert torch.equal(store.saved_inputs(tmp_path / "out")["input"], x)


def test_nothing_in_the_directory_is_a_pickle(tmp_path):
    *_, folder = saved(tmp_path)
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".html"}
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def test_without_the_class_it_says_so_and_runs_no_code(tmp_path):
    _, _, result, folder = saved(tmp_path)
    with pytest.raises(PlanError, match=r"give it: load\(dir, model=dense_model\)"):
        store.load(folder)
    about = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(about | {"source": "os:abort"}))
    with pytest.raises(PlanError, match=r"'os:abort', and code is not run on a directory's word"):
        store.load(folder)
    assert result.source == ""


def test_another_model_is_refused(tmp_path):
    *_, folder = saved(tmp_path)
    with pytest.raises(PlanError, match="use the dense model"):
        store.load(folder, build("residual")[0])


def test_an_already_pruned_model_is_refused(tmp_path):
    _, _, result, folder = saved(tmp_path)
    with pytest.raises(PlanError, match="use the dense model"):
        store.load(folder, result.model)


FILES = ["model.json", "model.safetensors", "inputs.safetensors", "plan.json", "plan.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "pickle"])
def test_broken_files_are_refused(file, how, tmp_path):
    model, _, _, folder = saved(tmp_path)
    path = folder / file
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": path.read_bytes()[:-7], "pickle": b"\x80\x04cos\nabort\n."}[how])
    with pytest.raises(PruneError) as caught:
        store.load(folder, model)
    assert file.split(".")[0] in str(caught.value)


def rewritten(folder, **changes):
    about = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(about | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "has format version 99"),
        ({"form": "pickle"}, "form is 'pickle'"),
        ({"aliases": {"x": "../../secret"}}, "ties 'x' to '../../secret'"),
        ({"aliases": None}, "expected 'aliases' to be a dict"),
        ({"inputs": {}}, "example inputs are damaged"),
        ({"inputs": {"args": [{"tensor": 7}], "kwargs": {}}}, "example inputs are damaged"),
        ({"inputs": {"args": [{"code": "1"}], "kwargs": {}}}, "unreadable example input"),
    ],
)
def test_hostile_descriptions_are_refused(changes, message, tmp_path):
    model, _, _, folder = saved(tmp_path)
    rewritten(folder, **changes)
    with pytest.raises(DataError, match=message):
        store.load(folder, model)


@pytest.mark.parametrize("what", ["shape", "dtype", "lost", "extra"])
def test_weights_that_do_not_fit_are_named(what, tmp_path):
    model, _, _, folder = saved(tmp_path)
    state = load_file(folder / "model.safetensors")
    name = "3.weight"
    change = {
        "shape": {name: torch.zeros(1, 2, 3)},
        "dtype": {name: state[name].double()},
        "extra": {"surplus": torch.zeros(1)},
        "lost": {},
    }[what]
    if what == "lost":
        del state[name]
    save_file(state | change, folder / "model.safetensors")
    with pytest.raises(PlanError, match=r"surplus" if what == "extra" else r"expected 3\.weight of torch\.float32"):
        store.load(folder, model)


def test_a_failed_save_leaves_the_old_directory(tmp_path, monkeypatch):
    model, inputs, result, folder = saved(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(type(result.plan), "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save(result, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert torch.equal(store.load(folder, model)(inputs), result.model(inputs))


def test_something_else_than_a_directory(tmp_path):
    with pytest.raises(DataError, match="is no directory"):
        store.load(tmp_path / "nowhere")
