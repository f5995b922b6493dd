"""The models of the zoo: a small variant of every timm family, tiny Hugging Face models, torchvision.

Every entry builds its model with random weights and example inputs. Nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import common
from zoo_entry import Built, Entry
from zoo_hf import text_models
from zoo_hf_senses import sense_models

# --- timm ------------------------------------------------------------------------------------------

Timm = tuple[str, int, dict[str, Any]]  # variant, image size, arguments that make a large variant small

_SMALL_VIT = {"embed_dim": 192, "depth": 3, "num_heads": 3}
_HEAD = {"num_classes": 10}  # an encoder without a head promises its residual stream to the caller

TIMM: dict[str, Timm] = {
    "beit": ("beit_base_patch16_224", 224, _SMALL_VIT),
    "byoanet": ("halonet_h1", 256, {}),
    "byobnet": ("mobileone_s0", 96, {}),
    "cait": ("cait_xxs24_224", 224, {}),
    "coat": ("coat_tiny", 224, {}),
    "convit": ("convit_tiny", 224, {}),
    "convmixer": ("convmixer_768_32", 96, {}),
    "convnext": ("convnext_atto", 96, {}),
    "cpubone": ("cpubone_nano", 96, {}),
    "crossvit": ("crossvit_tiny_240", 240, {}),
    "csatv2": ("csatv2", 128, {}),
    "cspnet": ("cs3darknet_s", 96, {}),
    "cspnext": ("cspnext_tiny", 96, {}),
    "davit": ("davit_tiny", 96, {}),
    "deepseek_vit": ("deepseek_vit_412m", 112, _SMALL_VIT | _HEAD),
    "deit": ("deit_tiny_distilled_patch16_224", 224, {}),
    "densenet": ("densenet121", 96, {}),
    "dla": ("dla46x_c", 96, {}),
    "dpn": ("dpn48b", 96, {}),
    "edgenext": ("edgenext_xx_small", 96, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 224, {}),
    "efficientnet": ("efficientnet_b0", 96, {}),
    "efficientvim": ("efficientvim_m1", 128, {}),
    "efficientvit_mit": ("efficientvit_b0", 96, {}),
    "efficientvit_msra": ("efficientvit_m0", 224, {}),
    "eva": ("eva02_tiny_patch14_224", 224, _HEAD),
    "fasternet": ("fasternet_t0", 96, {}),
    "fastvit": ("fastvit_t8", 96, {}),
    "focalnet": ("focalnet_tiny_srf", 96, {}),
    "gcvit": ("gcvit_xxtiny", 224, {}),
    "gemma4_vit": ("gemma4_vit_167m", 96, _SMALL_VIT | _HEAD),
    "ghostnet": ("ghostnet_050", 96, {}),
    "hardcorenas": ("hardcorenas_a", 96, {}),
    "hgnet": ("hgnetv2_b0", 96, {}),
    "hiera": ("hiera_tiny_224", 224, {}),
    "hieradet_sam2": ("hieradet_small", 128, {}),
    "hrnet": ("hrnet_w18_small", 96, {}),
    "iformer": ("iformer_t", 96, {}),
    "inception_next": ("inception_next_atto", 96, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 139, {}),
    "inception_v3": ("inception_v3", 139, {}),
    "inception_v4": ("inception_v4", 139, {}),
    "lcnetv2": ("lcnetv2_small", 96, {}),
    "levit": ("levit_128s", 224, {}),
    "lowformer": ("lowformer_b0", 96, {}),
    "mambaout": ("mambaout_femto", 96, {}),
    "maxxvit": ("maxvit_pico_rw_256", 256, {}),
    "metaformer": ("poolformerv2_s12", 96, {}),
    "mlp_mixer": ("gmixer_12_224", 224, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 96, {}),
    "mobilenetv5": ("mobilenetv5_base", 128, {}),
    "mobilevit": ("mobilevit_xxs", 128, {}),
    "mvitv2": ("mvitv2_tiny", 224, {}),
    "naflexvit": ("naflexvit_base_patch16_gap", 96, _SMALL_VIT),
    "nasnet": ("nasnetalarge", 96, {}),
    "nest": ("nest_tiny", 224, {}),
    "nextvit": ("nextvit_small", 96, {}),
    "nfnet": ("nf_regnet_b0", 96, {}),
    "pit": ("pit_ti_224", 224, {}),
    "pnasnet": ("pnasnet5large", 96, {}),
    "pvt_v2": ("pvt_v2_b0", 96, {}),
    "qwen3_vit": ("qwen3_vit_88m", 96, _SMALL_VIT | _HEAD),
    "rdnet": ("rdnet_tiny", 96, {}),
    "regnet": ("regnety_002", 96, {}),
    "repghost": ("repghostnet_050", 96, {}),
    "repvit": ("repvit_m0_9", 96, {}),
    "res2net": ("res2net50_14w_8s", 96, {}),
    "resnest": ("resnest14d", 96, {}),
    "resnet": ("resnet18", 96, {}),
    "resnetv2": ("resnetv2_18", 96, {}),
    "rexnet": ("rexnet_100", 96, {}),
    "selecsls": ("selecsls42b", 96, {}),
    "senet": ("legacy_seresnet18", 96, {}),
    "sequencer": ("sequencer2d_s", 224, {}),
    "shvit": ("shvit_s1", 96, {}),
    "sknet": ("skresnet18", 96, {}),
    "starnet": ("starnet_s050", 96, {}),
    "swiftformer": ("swiftformer_xs", 224, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 224, {}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 256, {}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 224, {}),
    "tiny_vit": ("tiny_vit_5m_224", 224, {}),
    "tnt": ("tnt_s_patch16_224", 224, {}),
    "tresnet": ("tresnet_m", 96, {}),
    "twins": ("twins_svt_small", 224, {}),
    "vgg": ("vgg11_bn", 96, {}),
    "visformer": ("visformer_tiny", 224, {}),
    "vision_transformer": ("vit_tiny_patch16_224", 224, {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 224, {}),
    "vision_transformer_relpos": ("vit_srelpos_small_patch16_224", 224, {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 224, _SMALL_VIT | {"global_attn_indexes": (1,)}),
    "vitamin": ("vitamin_small_224", 224, {}),
    "volo": ("volo_d1_224", 224, {}),
    "vovnet": ("ese_vovnet19b_slim_dw", 96, {}),
    "xception": ("xception", 96, {}),
    "xception_aligned": ("xception41p", 96, {}),
    "xcit": ("xcit_nano_12_p8_224", 224, {}),
}
"""Family (module of ``timm.models``) -> its small variant."""


def timm_models() -> list[Entry]:
    def build(variant: str, side: int, arguments: dict[str, Any]) -> Built:
        import timm

        return timm.create_model(variant, pretrained=False, **arguments), torch.randn(2, 3, side, side)

    return [
        Entry("timm", family, lambda row=row: build(*row))  # type: ignore[misc]
        for family, row in TIMM.items()
    ]


# --- torchvision -----------------------------------------------------------------------------------


VISION = {
    "alexnet": 96, "convnext_tiny": 96, "densenet121": 96, "efficientnet_b0": 96, "efficientnet_v2_s": 96,
    "googlenet": 96, "inception_v3": 139, "maxvit_t": 224, "mnasnet0_5": 96, "mobilenet_v2": 96,
    "mobilenet_v3_small": 96, "regnet_y_400mf": 96, "resnet18": 96, "resnext50_32x4d": 96, "shufflenet_v2_x0_5": 96,
    "squeezenet1_1": 96, "swin_t": 224, "swin_v2_t": 256, "vgg11_bn": 96, "vit_b_16": 224, "wide_resnet50_2": 96,
}  # fmt: skip
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTION = ("retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "fasterrcnn_resnet50_fpn")
VIDEO = {"r3d_18": 64, "mc3_18": 64, "r2plus1d_18": 64, "s3d": 224, "mvit_v1_b": 224, "swin3d_t": 64}


class Detector(nn.Module):
    """What of a torchvision detector has fixed shapes: from a batch of images to the heads' raw outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head if hasattr(model, "head") else model.rpn.head

    def forward(self, images: torch.Tensor) -> Any:
        return self.head(list(self.backbone(images).values()))


def torchvision_models() -> list[Entry]:
    def classifier(name: str, side: int) -> Built:
        models = common.torchvision().models
        extra = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, weights=None, **extra), torch.randn(2, 3, side, side)

    def segmenter(name: str) -> Built:
        models = common.torchvision().models
        return models.get_model(name, weights=None, weights_backbone=None), torch.randn(2, 3, 96, 96)

    def detector(name: str) -> Built:
        models = common.torchvision().models
        return Detector(models.get_model(name, weights=None, weights_backbone=None)), torch.randn(2, 3, 128, 128)

    def film(name: str, side: int) -> Built:
        models, frames = common.torchvision().models, 16 if side > 64 else 8
        return models.get_model(name, weights=None), torch.randn(2, 3, frames, side, side)

    found = [Entry("torchvision", n, lambda n=n, s=s: classifier(n, s)) for n, s in VISION.items()]  # type: ignore[misc]
    found += [Entry("torchvision", n, lambda n=n: segmenter(n)) for n in SEGMENTATION]  # type: ignore[misc]
    found += [Entry("torchvision", n, lambda n=n: detector(n)) for n in DETECTION]  # type: ignore[misc]
    found += [Entry("torchvision", n, lambda n=n, s=s: film(n, s)) for n, s in VIDEO.items()]  # type: ignore[misc]
    return found


# --- all -------------------------------------------------------------------------------------------


def entries() -> list[Entry]:
    """Every model of the three lists, in order."""
    return [*timm_models(), *text_models(), *sense_models(), *torchvision_models()]


def build(entry: Entry, seed: int = 0) -> Built:
    """The model in evaluation mode and its inputs, with weights of which none is constant or vanishing.

    Zero-initialised scales and residual branches would let a wrong result pass, because nothing of it shows.
    """
    torch.manual_seed(seed)
    model, inputs = entry.build()
    for buffer, value in model.named_buffers():
        if buffer.endswith("running_mean"):
            value.uniform_(-0.3, 0.3)
        elif buffer.endswith("running_var"):
            value.uniform_(0.7, 1.3)
    with torch.no_grad():
        for parameter in model.parameters():
            stir_(parameter)
    return model.eval(), inputs


def stir_(parameter: torch.Tensor) -> None:
    """Draw a parameter anew where all its elements are equal, or where it is too small to matter."""
    if not parameter.is_floating_point() or not parameter.numel():
        return
    first = float(parameter.flatten()[0])
    if parameter.dim() > 1:
        enough = (parameter.numel() / len(parameter)) ** -0.5
        if not float(parameter.std(correction=0)) >= 0.5 * enough:
            parameter.normal_(0, 0.7 * enough)
    elif not bool((parameter == first).all()):
        return
    elif abs(first) >= 0.1:
        parameter.uniform_(0.6, 1.4).mul_(first)
    else:
        parameter.uniform_(0.05, 0.3).mul_(torch.randint(0, 2, parameter.shape) * 2 - 1)
