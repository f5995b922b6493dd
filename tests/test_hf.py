"""Hugging Face models, as tiny random configurations: the class keeps running, and its own files load again."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from secateur import api, store
from secateur.apply.shrink import carry_out, relative_error
from secateur.graph import analyze
from secateur.graph.trace import run
from secateur.planning import make

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

COMMON = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
IMAGES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
OPT = {k: v for k, v in COMMON.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 10, "d_ff": 48, "num_layers": 2, "num_heads": 4}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40}
BART = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
}  # fmt: skip
STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "text"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, "text"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 10}, "text"),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, "text"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": 10}, "text"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, "text"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", COMMON, "text"),
    "bert": ("BertForSequenceClassification", "BertConfig", COMMON, "text"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", COMMON, "text"),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL, "text"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "text"),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, "text"),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, "two texts"),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, "two texts"),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGES, "image"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", IMAGES, "image"),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2,
              "state_size": 8, "time_step_rank": 4}, "text"),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", STAGES | {"embedding_size": 16, "layer_type": "basic"},
               "larger image"),
    "segformer": ("SegformerForImageClassification", "SegformerConfig", STAGES | {"num_attention_heads": [1, 2, 4, 5]},
                  "larger image"),
}  # fmt: skip
WIDTHS = ("*head width", "*value width")


@pytest.fixture(scope="module")
def transformers(torchvision):
    return pytest.importorskip("transformers")


def build(transformers, name):
    """The model, in evaluation mode, with weights large enough that a wrong scale shows; and its inputs."""
    kind, config, fields, inputs = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**fields)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))

    def ids(n):
        return torch.randint(3, 50, (2, n))

    made = {
        "text": lambda: {"input_ids": ids(7)},
        "two texts": lambda: {"input_ids": ids(7), "decoder_input_ids": ids(5)},
        "image": lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
        "larger image": lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    }[inputs]()
    return model, made


def wishes_of(graph, ignore=(), part=None):
    """Globs that match something in this model; ``part``: glob -> part removed."""
    names = [a.name for a in graph.free]
    fit = [g for g in (*ignore, *(part or {})) if any(fnmatchcase(n, g) for n in names)]
    return {
        "ignore": [g for g in ignore if g in fit],
        "overrides": {g: p for g, p in (part or {}).items() if g in fit} or None,
    }


def shrunk(model, inputs, budget="params=75%", **limits):
    graph = analyze(model, inputs)
    how = {"budget": budget, "criterion": "random", "allocate": "uniform", **wishes_of(graph, **limits)}
    done = carry_out(model, make(model, graph, **how))
    if done.form == "program" and done.equal:
        done = carry_out(model, make(model, graph, **how, equal=done.equal))
    return done


@pytest.mark.parametrize("name", MODELS)
def test_the_class_holds_the_new_sizes(transformers, name):
    model, inputs = build(transformers, name)
    before = model.config.to_dict()
    done = shrunk(model, inputs, "params=70%")
    assert done.form == "module", done.why
    assert sum(p.numel() for p in done.model.parameters()) <= 0.7 * sum(p.numel() for p in model.parameters())
    assert model.config.to_dict() == before
    assert type(done.model) is type(model)
    done.model.train()(**inputs)[0].square().mean().backward()
    assert any(p.grad is not None for p in done.model.parameters())


ROUND_TRIPS = {
    "llama": {"ignore": WIDTHS},
    "qwen3": {"ignore": WIDTHS},
    "mistral": {"ignore": WIDTHS},
    "t5": {},
    "vit": {"ignore": WIDTHS, "part": {"*residual stream": 0.25, "*heads": 0.25}},
    "deit": {"ignore": WIDTHS, "part": {"*residual stream": 0.25, "*heads": 0.25}},
    "gpt2": {"ignore": WIDTHS, "part": {"*residual stream": 0.25, "*heads": 0.25}},
    "opt": {"ignore": WIDTHS, "part": {"*residual stream": 0.25, "*heads": 0.25}},
    "bert": {"ignore": WIDTHS, "part": {"*residual stream": 0.25, "*heads": 0.25, "*pooler*": 0.25}},
    "roberta": {"ignore": WIDTHS, "part": {"*residual stream": 0.25, "*heads": 0.25, "*classifier*": 0.25}},
    "distilbert": {"ignore": WIDTHS, "part": {"*residual stream": 0.25, "*heads": 0.25, "*pre_classifier*": 0.25}},
    "bart": {"ignore": (*WIDTHS, "*heads"), "budget": "params=92%"},
    "gpt_neox": {"ignore": WIDTHS, "part": {"*residual stream": 0.25, "*heads": 0.25}},
    "mamba": {},
    "resnet": {},
}  # fmt: skip
"""What keeps the widths such that the class's configuration can say them: most compute one from another."""


def check_round_trip(model, inputs, done, folder):
    assert done.form == "module", done.why
    assert done.unsaved == ""
    done.model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert relative_error(run(loaded.eval(), inputs), run(done.model, inputs)) < 1e-6
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    return loaded


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_save_pretrained_and_from_pretrained_are_a_round_trip(transformers, name, tmp_path):
    model, inputs = build(transformers, name)
    done = shrunk(model, inputs, **ROUND_TRIPS[name])
    loaded = check_round_trip(model, inputs, done, tmp_path)
    assert loaded.config.to_dict() != model.config.to_dict()


def test_grouped_queries_are_in_the_configuration(transformers, tmp_path):
    model, inputs = build(transformers, "llama")
    done = shrunk(model, inputs, ignore=WIDTHS, part={"*kv heads": 0.5, "*residual stream": 0.25, "*queries*": 0.0})
    config = check_round_trip(model, inputs, done, tmp_path).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert config.hidden_size == 24
    assert done.model.config.to_dict()["num_attention_heads"] == 2


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_narrower_heads_take_the_scale_into_the_query(transformers, name, tmp_path):
    model, inputs = build(transformers, name)
    part = {"*residual stream": 0.25, "*head width": 0.25, "*value width": 0.25}
    done = shrunk(model, inputs, ignore=("*heads",), part=part)
    assert set(done.factors.values()) == {0.75**0.5}
    loaded = check_round_trip(model, inputs, done, tmp_path)
    scales = [m.scaling for m in loaded.modules() if hasattr(m, "scaling")]
    assert all(scale == pytest.approx(6**-0.5) for scale in scales)


def test_what_a_configuration_cannot_say_is_left_out_of_it(transformers, tmp_path):
    model, inputs = build(transformers, "llama")
    result = api.prune(model, inputs, budget="params=60%")
    assert result.form == "module"
    assert result.model.config.to_dict() == model.config.to_dict()
    assert any("save_pretrained would not be loadable" in note for note in result.report.notes)
    store.save(result, tmp_path / "out")
    loaded = store.load(tmp_path / "out", build(transformers, "llama")[0])
    assert relative_error(run(loaded, inputs), run(result.model, inputs)) == 0
    assert type(loaded) is type(model)


def test_a_saved_model_has_its_new_configuration(transformers, tmp_path):
    model, inputs = build(transformers, "mistral")
    ignore = wishes_of(analyze(model, inputs), WIDTHS)["ignore"]
    result = api.prune(model, inputs, budget="params=60%", allocate="uniform", ignore=ignore)
    store.save(result, tmp_path / "ours")
    loaded = store.load(tmp_path / "ours", build(transformers, "mistral")[0])
    assert loaded.config.to_dict() == result.model.config.to_dict()
    loaded.save_pretrained(tmp_path / "theirs")
    again = type(model).from_pretrained(tmp_path / "theirs").eval()
    assert relative_error(run(again, inputs), run(result.model, inputs)) < 1e-6
