"""timm: the smallest member of each family."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from tools.coverage.zoos.sample import CLASSES, SIDE, Builder, Sample, images

TIMM = """
beit_base_patch16_224 botnet26t_256 eca_halonext26ts gcresnext26ts cait_xxs24_224 coat_lite_tiny
coat_tiny convit_tiny convmixer_768_32 convnext_atto convnextv2_atto cpubone_nano crossvit_tiny_240
csatv2 cspresnet50 darknet53 cspnext_tiny davit_tiny deit3_small_patch16_224 densenet121 dla46_c
dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 mobilenetv2_100
mixnet_s tinynet_e mnasnet_small efficientvim_m1 efficientvit_b0 efficientvit_m0
eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050
ghostnetv3_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v4 lcnetv2_small levit_128s lowformer_b0
mambaout_femto coatnet_nano_rw_224 maxvit_tiny_tf_224 poolformer_s12 caformer_s18 gmixer_12_224
gmlp_ti16_224 mixer_s32_224 resmlp_12_224 mobilenetv3_small_050 lcnet_035 fbnetv3_b mobilevit_xxs
mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap nest_tiny nextvit_small nf_resnet26
eca_nfnet_l0 nfnet_f0 pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_b16
repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnet10t seresnet18 ecaresnet26t
resnetblur18 resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18
starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small
vgg11_bn visformer_tiny vit_tiny_patch16_224 vit_small_patch16_18x2_224
vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim
legacy_xception xception41 xcit_nano_12_p8_224 nasnetalarge pnasnet5large mobilenetv5_base
samvit_base_patch16 qwen3_vit_88m gemma4_vit_167m deepseek_vit_412m
"""
# image sides that a family needs; the first that the model takes is used
TIMM_SIDES = {
    "inception_resnet_v2": 96, "inception_v4": 96, "nasnetalarge": 96, "pnasnet5large": 96,
    "eva02_tiny_patch14_224": 56, "levit_128s": 224, "volo_d1_224": 224, "legacy_xception": 64,
}  # fmt: skip


def timm() -> dict[str, Builder]:
    """One architecture, mostly the smallest, of each family (or several where they differ)."""
    zoo = importlib.import_module("timm")
    have = set(zoo.list_models())
    return {n: lambda n=n: _timm(zoo, n) for n in TIMM.split() if n in have}  # type: ignore[misc]


def _timm(zoo: Any, name: str) -> Sample:
    side = TIMM_SIDES.get(name, SIDE)
    choices: list[tuple[int, dict[str, Any]]] = [(side, {"img_size": side}), (side, {})]
    choices += [(s, o) for s in (96, 128, 224, 256) for o in ({"img_size": s}, {})]
    failure: Exception | None = None
    for size, options in choices:
        try:
            model = zoo.create_model(name, pretrained=False, num_classes=CLASSES, **options)
            with torch.no_grad():
                model.eval()(images(size))
            note = f"{size} px" if size != SIDE else ""
            return Sample(model, (images(size),), note=note)
        except (TypeError, AssertionError, RuntimeError, ValueError, IndexError) as e:
            failure = e
    assert failure is not None
    raise failure
