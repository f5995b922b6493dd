"""Tiny random configurations of Hugging Face architectures: the zoo's second list.

Sizes differ in every dimension, so that no two of them agree by accident: hidden 48, feed-forward 80, 4 heads of 10
(2 for keys and values), 100 words, 2 layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo_entry import Entry

Settings = dict[str, Any]

WORDS: Settings = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: Settings = WORDS | {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
WIDE = LLAMA | {"head_dim": 10}
MOE: Settings = {"num_experts_per_tok": 2, "moe_intermediate_size": 28}
MLA: Settings = {
    "q_lora_rank": 22, "kv_lora_rank": 14, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
MAMBA: Settings = WORDS | {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 6, "expand": 2, "use_cache": False}

DECODERS: dict[str, Settings] = {
    "llama": WIDE,
    "qwen2": LLAMA,
    "qwen3": WIDE,
    "qwen2_moe": LLAMA | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 36, "mlp_only_layers": []},
    "qwen3_moe": WIDE | MOE | {"num_experts": 4},
    "qwen3_next": WIDE | MOE | {
        "num_experts": 4, "shared_expert_intermediate_size": 36, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 6, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "gemma": WIDE,
    "gemma2": WIDE | {"sliding_window": 5},
    "gemma3_text": WIDE | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": WIDE | {"sliding_window": 5},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "deepseek_v2": LLAMA | MLA | MOE | {"num_key_value_heads": 4, "topk_method": "greedy", "head_dim": 6},
    "deepseek_v3": LLAMA | MLA | MOE | {"num_key_value_heads": 4, "head_dim": 6},
    "minicpm3": LLAMA | {k: MLA[k] for k in list(MLA)[:5]} | {"num_key_value_heads": 4},
    "phi": LLAMA,
    "phi3": LLAMA,
    "phimoe": LLAMA | {"num_local_experts": 4},
    "gpt2": WORDS | {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_inner": 80, "n_positions": 64, "use_cache": False},
    "gptj": WORDS | {
        "n_embd": 48, "n_head": 4, "n_layer": 2, "n_inner": 80, "n_positions": 64, "rotary_dim": 8, "use_cache": False,
    },
    "gpt_neo": WORDS | {
        "hidden_size": 48, "num_layers": 2, "num_heads": 4, "intermediate_size": 80, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]], "window_size": 5, "use_cache": False,
    },
    "gpt_neox": LLAMA,
    "codegen": WORDS | {
        "n_embd": 48, "n_head": 4, "n_layer": 2, "n_inner": 80, "n_positions": 64, "rotary_dim": 8, "use_cache": False,
    },
    "opt": LLAMA | {"ffn_dim": 80, "word_embed_proj_dim": 36},
    "bloom": WORDS | {"hidden_size": 48, "n_head": 4, "n_layer": 2, "use_cache": False},
    "falcon": LLAMA | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80},
    "mpt": WORDS | {"d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "use_cache": False},
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmoe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "granite": LLAMA,
    "granitemoe": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": LLAMA,
    "cohere2": WIDE | {"sliding_window": 5},
    "stablelm": LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "starcoder2": LLAMA,
    "nemotron": LLAMA,
    "persimmon": LLAMA,
    "glm": WIDE,
    "smollm3": LLAMA,
    "helium": LLAMA | {"head_dim": 12},
    "ernie4_5": WIDE,
    "biogpt": LLAMA,
    "xglm": WORDS | {
        "d_model": 48, "ffn_dim": 80, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64,
        "use_cache": False,
    },
    "modernbert-decoder": LLAMA,
    "xlnet": WORDS | {"d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 80, "use_mems_eval": False},
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 8, "head_dim": 12, "n_groups": 2, "chunk_size": 4},
    "rwkv": WORDS | {"hidden_size": 48, "num_hidden_layers": 2, "context_length": 32, "use_cache": False},
    "recurrent_gemma": WIDE | {"num_key_value_heads": 1, "lru_width": 56, "attention_window_size": 5},
    "jamba": LLAMA | {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 6,
    },
}  # fmt: skip

BERT: Settings = LLAMA | {"type_vocab_size": 2}
ENCODERS: dict[str, Settings] = {
    "bert": BERT,
    "distilbert": WORDS | {"dim": 48, "n_heads": 4, "n_layers": 2, "hidden_dim": 80, "max_position_embeddings": 64},
    "roberta": BERT,
    "albert": BERT | {"embedding_size": 20},
    "electra": BERT | {"embedding_size": 20},
    "deberta": BERT | {"relative_attention": True, "pos_att_type": "c2p|p2c", "max_relative_positions": 16},
    "deberta-v2": BERT | {
        "relative_attention": True, "pos_att_type": "c2p|p2c", "position_buckets": 8, "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    "mpnet": BERT,
    "funnel": WORDS | {"d_model": 48, "n_head": 4, "d_head": 10, "d_inner": 80, "block_sizes": [1, 1]},
    "squeezebert": BERT | {
        "embedding_size": 48, "q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2, "output_groups": 2,
    },
    "mobilebert": BERT | {"embedding_size": 20, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "convbert": BERT | {"embedding_size": 20, "head_ratio": 2, "conv_kernel_size": 3},
    "roformer": BERT | {"embedding_size": 20},
    "nystromformer": BERT | {"num_landmarks": 64},
    "fnet": BERT,
    "megatron-bert": BERT,
    "rembert": BERT | {"input_embedding_size": 20, "output_embedding_size": 28},
    "modernbert": LLAMA,
    "esm": BERT | {"position_embedding_type": "rotary", "mask_token_id": 3},
    "big_bird": BERT | {"attention_type": "original_full"},
    "ibert": BERT,
    "longformer": BERT | {"attention_window": [4, 4]},
}  # fmt: skip

BART: Settings = WORDS | {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "max_position_embeddings": 64, "decoder_start_token_id": 1,
    "use_cache": False,
}  # fmt: skip
T5: Settings = WORDS | {
    "d_model": 48, "d_kv": 10, "d_ff": 80, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1,
    "use_cache": False,
}  # fmt: skip
SEQ2SEQ: dict[str, Settings] = {
    "t5": T5,
    "umt5": T5 | {"feed_forward_proj": "gated-gelu"},
    "switch_transformers": T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "longt5": T5 | {"local_radius": 3},
    "bart": BART,
    "mbart": BART,
    "marian": BART,
    "pegasus": BART,
    "blenderbot": BART,
    "m2m_100": BART,
    "led": BART | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "prophetnet": WORDS | {
        "hidden_size": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "num_encoder_layers": 2,
        "num_decoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
        "max_position_embeddings": 64, "use_cache": False,
    },
}  # fmt: skip


def _auto(kind: str, name: str, settings: Settings) -> nn.Module:
    """A model of configuration ``name``; the size arguments that its configuration does not know are left out."""
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, **settings)
    for word in ("use_cache", "return_dict"):
        if hasattr(config, word):
            setattr(config, word, word == "return_dict")
    return getattr(transformers, kind).from_config(config)


def _ids(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 100, (2, length))


def _masks(name: str) -> dict[str, torch.Tensor]:
    """Attention masks for the one that cannot do without them while it is exported."""
    if name != "longt5":
        return {}
    return {f"{p}attention_mask": torch.ones(2, n, dtype=torch.long) for p, n in (("", 8), ("decoder_", 5))}


def text_models() -> list[Entry]:
    """Decoders, encoders, then those that are both."""
    found = []
    for kind, table in (("AutoModelForCausalLM", DECODERS), ("AutoModelForMaskedLM", ENCODERS)):
        for name, settings in table.items():
            found.append(Entry("hf", name, lambda k=kind, n=name, s=settings: (_auto(k, n, s), {"input_ids": _ids(8)})))
    for name, settings in SEQ2SEQ.items():
        inputs = lambda n=name: {"input_ids": _ids(8), "decoder_input_ids": _ids(5), **_masks(n)}
        found.append(
            Entry("hf", name, lambda n=name, s=settings, i=inputs: (_auto("AutoModelForSeq2SeqLM", n, s), i()))
        )
    return found
