"""Tiny random configurations of Hugging Face architectures that hear and see: images, sounds, films, series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo_entry import Entry
from zoo_hf import BART, LLAMA, Settings, _auto, _ids

CLASSES: Settings = {"num_labels": 7}
VIT: Settings = CLASSES | {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SWIN: Settings = CLASSES | {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [1, 1, 2],
    "num_heads": [2, 2, 4],
    "window_size": 4,
}
STAGES: Settings = CLASSES | {"hidden_sizes": [12, 20, 28], "depths": [1, 2, 1]}
WAV: Settings = {
    "vocab_size": 30, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "conv_dim": (20, 24, 28), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "pad_token_id": 0, "mask_time_prob": 0.0,
}  # fmt: skip

IMAGES: dict[str, tuple[Settings, int]] = {  # with the side of the image
    "vit": (VIT, 32),
    "beit": (VIT | {"use_relative_position_bias": True}, 32),
    "dinov2": (VIT | {"mlp_ratio": 2}, 32),
    "dinov2_with_registers": (VIT | {"mlp_ratio": 2, "num_register_tokens": 3}, 32),
    "ijepa": (VIT, 32),
    "hiera": (CLASSES | {
        "embed_dim": 12, "image_size": [64, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8],
    }, 64),
    "swin": (SWIN, 32),
    "swinv2": (SWIN, 32),
    "focalnet": (CLASSES | {
        "image_size": 32, "patch_size": 2, "embed_dim": 12, "hidden_sizes": [12, 24, 48], "depths": [1, 1, 2],
        "focal_levels": [2, 2, 2], "focal_windows": [3, 3, 3],
    }, 32),
    "convnext": (STAGES | {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 2, 1]}, 64),
    "convnextv2": (STAGES | {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 2, 1]}, 64),
    "segformer": (CLASSES | {
        "hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 22,
    }, 64),
    "mobilevit": (CLASSES | {
        "hidden_sizes": [18, 24, 32], "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 36], "num_attention_heads": 2,
        "image_size": 64,
    }, 64),
    "mobilevitv2": (CLASSES | {"width_multiplier": 0.25, "image_size": 64}, 64),
    "mobilenet_v1": (CLASSES | {"depth_multiplier": 0.25}, 64),
    "mobilenet_v2": (CLASSES | {"depth_multiplier": 0.35}, 64),
    "pvt": (CLASSES | {
        "image_size": 64, "hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
    }, 64),
    "pvt_v2": (CLASSES | {
        "image_size": 64, "hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
    }, 64),
    "poolformer": (STAGES | {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 2, 1]}, 64),
    "cvt": (CLASSES | {"embed_dim": [12, 20, 28], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, 64),
    "swiftformer": (CLASSES | {"embed_dims": [12, 20, 28, 36], "depths": [1, 1, 2, 1], "image_size": 64}, 64),
    "resnet": (STAGES | {"embedding_size": 12}, 64),
    "regnet": (STAGES | {"embedding_size": 12, "groups_width": 4}, 64),
    "bit": (STAGES | {"embedding_size": 12, "num_groups": 4, "hidden_sizes": [16, 24, 32]}, 64),
    "efficientnet": (CLASSES | {
        "image_size": 64, "hidden_dim": 1280, "in_channels": [32, 8, 14], "out_channels": [8, 14, 20],
        "kernel_sizes": [3, 3, 5], "strides": [1, 2, 2], "num_block_repeats": [1, 2, 1], "expand_ratios": [1, 3, 3],
        "depthwise_padding": [], "width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 4,
    }, 64),
}  # fmt: skip

BACKBONE: Settings = {
    "embedding_size": 12,
    "hidden_sizes": [12, 20, 28, 36],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
DETR: Settings = CLASSES | {
    "d_model": 48, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "num_queries": 9,
}  # fmt: skip


def _pixels(side: int, *front: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, *front, 3, side, side)}


def _make(model: str, config: str, settings: Settings) -> nn.Module:
    """A model by the names of its class and its configuration's class."""
    import transformers

    found = getattr(transformers, config)(**settings)
    if hasattr(found, "use_cache"):
        found.use_cache = False
    return getattr(transformers, model)(found)


def _resnet() -> Any:
    import transformers

    return transformers.ResNetConfig(**BACKBONE, out_features=["stage2", "stage3", "stage4"])


def _detr(model: str, config: str, **settings: Any) -> nn.Module:
    return _make(model, config, DETR | {"backbone_config": _resnet(), "use_timm_backbone": False} | settings)


TEXT: Settings = {k: LLAMA[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads", "max_position_embeddings", "pad_token_id",
                                        "bos_token_id", "eos_token_id")}  # fmt: skip
EYES: Settings = VIT | {"hidden_size": 36, "intermediate_size": 56}


def _clip() -> nn.Module:
    return _make("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": EYES, "projection_dim": 22})


def _siglip() -> nn.Module:
    shared = {"hidden_size": 36, "intermediate_size": 56}
    return _make(
        "SiglipModel", "SiglipConfig", {"text_config": TEXT | shared | {"projection_size": 36}, "vision_config": EYES}
    )


def _mask2former() -> nn.Module:
    import transformers

    body = transformers.SwinConfig(
        image_size=64, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    settings = {
        "backbone_config": body, "feature_size": 32, "mask_feature_size": 64, "hidden_dim": 32, "encoder_layers": 1,
        "encoder_feedforward_dim": 40, "dim_feedforward": 44, "decoder_layers": 2, "num_attention_heads": 4,
        "num_queries": 9, "num_labels": 7,
    }  # fmt: skip
    return _make("Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", settings)


def _dpt() -> nn.Module:
    settings = VIT | {
        "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 14,
        "num_hidden_layers": 4, "head_in_index": -1, "is_hybrid": False,
    }  # fmt: skip
    model = _make("DPTForDepthEstimation", "DPTConfig", settings)
    nn.init.constant_(model.head.head[4].bias, 3.0)  # the last ReLU must let something pass
    return model


FILM: Settings = VIT | {"num_frames": 4}
OTHERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "wav2vec2": lambda: (_auto("AutoModelForCTC", "wav2vec2", WAV), {"input_values": torch.randn(2, 400)}),
    "wav2vec2-conformer": lambda: (
        _auto("AutoModelForCTC", "wav2vec2-conformer", WAV | {"position_embeddings_type": "rotary"}),
        {"input_values": torch.randn(2, 400)},
    ),
    "hubert": lambda: (_auto("AutoModelForCTC", "hubert", WAV), {"input_values": torch.randn(2, 400)}),
    "wavlm": lambda: (
        _auto("AutoModelForCTC", "wavlm", WAV | {"num_buckets": 16}),
        {"input_values": torch.randn(2, 400)},
    ),
    "sew": lambda: (
        _auto("AutoModelForCTC", "sew", WAV | {"squeeze_factor": 2}),
        {"input_values": torch.randn(2, 400)},
    ),
    "audio-spectrogram-transformer": lambda: (
        _auto(
            "AutoModelForAudioClassification",
            "audio-spectrogram-transformer",
            VIT | {"max_length": 64, "num_mel_bins": 24, "frequency_stride": 6, "time_stride": 6},
        ),
        {"input_values": torch.randn(2, 64, 24)},
    ),
    "whisper": lambda: (
        _auto(
            "AutoModelForSpeechSeq2Seq",
            "whisper",
            BART | {"num_mel_bins": 14, "max_source_positions": 20, "max_target_positions": 16},
        ),
        {"input_features": torch.randn(2, 14, 40), "decoder_input_ids": _ids(5)},
    ),
    "speech_to_text": lambda: (
        _auto(
            "AutoModelForSpeechSeq2Seq",
            "speech_to_text",
            BART
            | {
                "input_feat_per_channel": 14,
                "max_source_positions": 64,
                "max_target_positions": 16,
                "conv_channels": 26,
            },
        ),
        {"input_features": torch.randn(2, 40, 14), "decoder_input_ids": _ids(5)},
    ),
    "clip": lambda: (_clip(), {"input_ids": _ids(), **_pixels(32)}),
    "clip_vision": lambda: (
        _make("CLIPVisionModelWithProjection", "CLIPVisionConfig", EYES | {"projection_dim": 22}),
        _pixels(32),
    ),
    "clip_text": lambda: (
        _make("CLIPTextModelWithProjection", "CLIPTextConfig", TEXT | {"projection_dim": 22}),
        {"input_ids": _ids()},
    ),
    "siglip": lambda: (_siglip(), {"input_ids": _ids(), **_pixels(32)}),
    "vilt": lambda: (
        _make("ViltModel", "ViltConfig", VIT | TEXT | {"max_image_length": -1}),
        {"input_ids": _ids(), **_pixels(32), "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)},
    ),
    "detr": lambda: (_detr("DetrForObjectDetection", "DetrConfig"), _pixels(64)),
    "conditional_detr": lambda: (_detr("ConditionalDetrForObjectDetection", "ConditionalDetrConfig"), _pixels(64)),
    "deformable_detr": lambda: (
        _detr("DeformableDetrForObjectDetection", "DeformableDetrConfig", num_feature_levels=3, d_model=64),
        _pixels(64),
    ),
    "yolos": lambda: (
        _make("YolosForObjectDetection", "YolosConfig", VIT | {"image_size": [32, 40], "num_detection_tokens": 9}),
        {"pixel_values": torch.randn(2, 3, 32, 40)},
    ),
    "deit": lambda: (_make("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT), _pixels(32)),
    "dinov3_vit": lambda: (_make("DINOv3ViTModel", "DINOv3ViTConfig", VIT | {"num_register_tokens": 3}), _pixels(32)),
    "levit": lambda: (
        _make(
            "LevitForImageClassificationWithTeacher",
            "LevitConfig",
            CLASSES
            | {
                "image_size": 64,
                "hidden_sizes": [16, 24, 36],
                "num_attention_heads": [2, 3, 4],
                "depths": [1, 1, 1],
                "key_dim": [6, 6, 6],
            },
        ),
        _pixels(64),
    ),
    "mask2former": lambda: (_mask2former(), _pixels(64)),
    "dpt": lambda: (_dpt(), _pixels(32)),
    "segformer_masks": lambda: (
        _make("SegformerForSemanticSegmentation", "SegformerConfig", IMAGES["segformer"][0]),
        _pixels(64),
    ),
    "videomae": lambda: (
        _auto("AutoModelForVideoClassification", "videomae", FILM | {"tubelet_size": 2}),
        _pixels(32, 4),
    ),
    "vivit": lambda: (
        _auto("AutoModelForVideoClassification", "vivit", FILM | {"tubelet_size": [2, 8, 8]}),
        _pixels(32, 4),
    ),
    "timesformer": lambda: (_auto("AutoModelForVideoClassification", "timesformer", FILM), _pixels(32, 4)),
    "patchtst": lambda: (
        _make(
            "PatchTSTForPrediction",
            "PatchTSTConfig",
            {
                "num_input_channels": 3,
                "context_length": 24,
                "patch_length": 4,
                "patch_stride": 4,
                "d_model": 48,
                "ffn_dim": 80,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "prediction_length": 6,
            },
        ),
        {"past_values": torch.randn(2, 24, 3)},
    ),
    "patchtsmixer": lambda: (
        _make(
            "PatchTSMixerForPrediction",
            "PatchTSMixerConfig",
            {
                "num_input_channels": 3,
                "context_length": 24,
                "patch_length": 4,
                "patch_stride": 4,
                "d_model": 20,
                "num_layers": 2,
                "prediction_length": 6,
            },
        ),
        {"past_values": torch.randn(2, 24, 3)},
    ),
}


def sense_models() -> list[Entry]:
    """Image classifiers, then everything else."""
    found = []
    for name, (settings, side) in IMAGES.items():
        build = lambda n=name, s=settings, w=side: (_auto("AutoModelForImageClassification", n, s), _pixels(w))
        found.append(Entry("hf", name, build))
    return found + [Entry("hf", name, build) for name, build in OTHERS.items()]
