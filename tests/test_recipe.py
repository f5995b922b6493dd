from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import MissingExtra, SpecError
from secateur.recipe import example_input, load_callable, load_model

FILE = """
import helper_of_nets
from torch import nn

def net():
    return nn.Linear(helper_of_nets.WIDTH, 2).train()

def number():
    return 3

def broken():
    raise ValueError("no weights here")

constant = 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "helper_of_nets.py").write_text("WIDTH = 5\n")
    path = tmp_path / "some_nets.py"
    path.write_text(FILE)
    yield path
    for name in ("helper_of_nets", "some_nets", "some_nets_file"):
        sys.modules.pop(name, None)


def test_a_factory_in_a_file_gives_a_model_in_evaluation_mode(file: Path) -> None:
    model = load_model(f"{file}:net")
    assert isinstance(model, nn.Linear)
    assert model.in_features == 5
    assert not model.training


def test_a_file_is_run_once(file: Path) -> None:
    assert load_callable(f"{file}:net") is load_callable(f"{file}:net")


def test_modules_of_the_current_folder_are_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert isinstance(load_model("some_nets:net"), nn.Linear)
    assert load_callable("./some_nets.py:number")() == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "'resnet18' is none of timm:NAME.*nor a directory"),
        ("{file}:nett", r"has no function 'nett'; it has net"),
        ("{file}:constant", "has no function 'constant'"),
        ("{file}:number", "gave a int, expected a torch.nn.Module"),
        ("{file}:broken", "could not be loaded: ValueError: no weights here"),
        ("{file}:", "names no function; expected package.module:name"),
        ("./nowhere.py:net", "there is no file .*nowhere.py"),
        ("no_such_package.nets:net", "there is no module 'no_such_package.nets'"),
        ("torch.nn:Identitty", "has no function 'Identitty'; it has Identity"),
    ],
)
def test_what_cannot_be_used_is_told(file: Path, spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_model(spec.format(file=file))


def test_an_unknown_name_of_a_package_is_told(torchvision: object) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(SpecError, match=r"timm has no model 'resnet_eighteen'; close names are .*resnet"):
        load_model("timm:resnet_eighteen")
    with pytest.raises(SpecError, match=r"torchvision has no model 'resnet_18'; close names are .*resnet18"):
        load_model("torchvision:resnet_18")


def test_a_hugging_face_model_comes_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.config.use_cache
    with pytest.raises(SpecError, match=r"hf:\./no/such/folder could not be loaded"):
        load_model("hf:./no/such/folder")


def test_a_file_that_fails_is_told_and_tried_again(file: Path) -> None:
    file.write_text("import no_such_thing\n")
    with pytest.raises(SpecError, match=r"some_nets.py could not be loaded: ModuleNotFoundError.*no_such_thing"):
        load_callable(f"{file}:net")
    file.write_text(FILE)
    assert load_callable(f"{file}:number")() == 3


@pytest.mark.parametrize(("spec", "extra"), [("timm:x", "timm"), ("torchvision:x", "vision"), ("hf:x", "hf")])
def test_a_missing_package_names_its_extra(spec: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "torchvision.models", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'secateur\[{extra}\]'"):
        load_model(spec)


def test_example_inputs_have_the_shape_and_are_the_same_every_time() -> None:
    assert example_input("2x3x4").shape == (2, 3, 4)
    assert torch.equal(example_input("2x3x4"), example_input("2x3x4"))


@pytest.mark.parametrize("text", ["", "3x", "0x3", "-1x3", "3,4", "1x3x2.5"])
def test_an_unreadable_shape_is_told(text: str) -> None:
    with pytest.raises(SpecError, match="expected sizes joined by x, such as 1x3x224x224"):
        example_input(text)
