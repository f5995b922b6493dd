"""Classes of timm and Hugging Face, and a network with real weights, lose whole blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layered import (
    dropping,
    frozen,
    without,
)
from torch import nn

import secateur as sc
from secateur.apply.blame import relative_error
from secateur.apply.shrink import carry_out
from secateur.graph.trace import run

# --- real classes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "budget", "left"),
    [
        ("vit_tiny_patch16_224", 64, "params=77%", 9),
        ("convnext_atto", 64, "params=80%", None),
        ("resnet26d", 64, "macs=80%", None),
        ("swin_tiny_patch4_window7_224", 64, "params=80%", None),
    ],
)
def test_timm_classes_lose_blocks(torchvision, name, size, budget, left):
    timm = pytest.importorskip("timm")
    sized = {"img_size": size} if name.startswith(("vit", "swin")) else {}
    model = timm.create_model(name, num_classes=10, **sized)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.6, 1.4)  # timm starts the last norm of a block at zero
    x = torch.randn(1, 3, size, size)
    plan = sc.plan(model.eval(), x, pattern="layer", budget=budget, criterion="random")
    assert plan.dropped
    done = carry_out(model, plan)
    assert done.form == "module"
    assert type(done.model) is type(model)
    assert relative_error(run(done.model, x), without(model, plan.dropped, x)) < 1e-5
    if left is not None:
        assert len(done.model.blocks) == left


def _llama(transformers):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_sizes(), num_key_value_heads=2, use_cache=False)
    ), {}


def _qwen3(transformers):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    window = {"layer_types": kinds, "sliding_window": 3, "use_sliding_window": True}
    config = transformers.Qwen3Config(**_sizes(), head_dim=8, num_key_value_heads=2, use_cache=False, **window)
    return transformers.Qwen3ForCausalLM(config), {}


def _bert(transformers):
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_sizes())), {}


def _gpt2(transformers):
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=4, n_head=4, use_cache=False)
    return transformers.GPT2LMHeadModel(config), {}


def _t5(transformers):
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, use_cache=False
    )
    return transformers.T5ForConditionalGeneration(config), {"decoder_input_ids": torch.randint(0, 40, (2, 5))}


def _sizes():
    return {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    }  # fmt: skip


HUGGING_FACE = {
    "llama": (_llama, "model.layers", "num_hidden_layers"),
    "qwen3": (_qwen3, "model.layers", "num_hidden_layers"),
    "bert": (_bert, "bert.encoder.layer", "num_hidden_layers"),
    "gpt2": (_gpt2, "transformer.h", "n_layer"),
    "t5": (_t5, "decoder.block", "num_decoder_layers"),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_classes_lose_layers_with_their_configuration(torchvision, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    factory, path, count = HUGGING_FACE[name]
    model, more = factory(transformers)
    x = {"input_ids": torch.randint(0, 40, (2, 6)), **more}
    names = [f"{path}.1", f"{path}.2"]
    model.eval()
    done = carry_out(model, dropping(model, x, names))
    assert (done.form, done.unsaved) == ("module", "")
    assert (getattr(done.model.config, count), getattr(model.config, count)) == (2, 4)
    if name == "t5":
        assert done.model.config.num_layers == 4  # of the encoder
        assert "is also used by" in frozen(model, x)["decoder.block.0"]  # its position bias serves all
    if name == "qwen3":
        assert done.model.config.layer_types == ["full_attention", "sliding_attention"]
    numbers = [m.layer_idx for m in done.model.get_submodule(path).modules() if hasattr(m, "layer_idx")]
    assert set(numbers) <= {0, 1}
    if name != "t5":  # its layers hand a bias on besides
        assert relative_error(run(done.model, x), without(model, names, x)) < 1e-5
    done.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    if hasattr(again.config, "use_cache"):
        again.config.use_cache = False
    assert relative_error(run(again, x), run(done.model, x)) < 1e-6


def test_a_class_that_its_configuration_cannot_make_says_so(torchvision):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 4], num_heads=[2, 2], window_size=4
    )
    model, x = transformers.SwinModel(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    done = carry_out(model, dropping(model, x, ["encoder.layers.1.blocks.0"]))
    assert done.form == "module"
    assert "its class computes something else" in done.unsaved  # which blocks shift their windows goes by number


def test_real_weights_of_a_resnet(data):
    from secateur.recipe import load_callable

    model = load_callable(f"{Path(__file__).resolve().parents[1] / 'benchmarks' / 'nets.py'}:resnet20")()
    x = torch.randn(2, 3, 32, 32)
    plan = sc.plan(model, x, pattern="layer", budget="macs=75%")
    done = carry_out(model, plan)
    assert done.form == "module"  # no size changes, so the shortcut that pads by a number still fits
    assert relative_error(run(done.model, x), without(model, plan.dropped, x)) < 1e-5
