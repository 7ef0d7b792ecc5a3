"""The architectures that ``coverage.py`` measures: small inputs, random weights, no download."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 3
CLASSES = 10
SIDE = 64


@dataclass
class Sample:
    """A model and an example call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    train: bool = True


Builder = Callable[[], Sample]


def images(side: int = SIDE, channels: int = 3) -> Tensor:
    """A batch of images."""
    return torch.randn(BATCH, channels, side, side)


def cut(model: nn.Module, keep: int, call: Callable[[], Any]) -> str:
    """Drop repeats: of consecutive equal blocks ``keep`` stay. Returns a note, if any went.

    A container is left whole where ``call`` does not run without its blocks.
    """
    dropped = 0
    for module in list(model.modules()):
        if not isinstance(module, (nn.Sequential, nn.ModuleList)):
            continue
        before = dict(module._modules)
        kept: list[tuple[str, nn.Module]] = []
        run, last = 0, None
        for name, child in module.named_children():
            kind = (type(child), tuple(p.shape for p in child.parameters()))
            run = run + 1 if kind == last and kind[1] else 1
            last = kind
            if run <= keep:
                kept.append((name, child))
        if len(kept) == len(before):
            continue
        if isinstance(module, nn.ModuleList):
            kept = [(str(i), child) for i, (_, child) in enumerate(kept)]
        _replace(module, dict(kept))
        try:
            with torch.no_grad():
                call()
            dropped += len(before) - len(kept)
        except Exception:
            _replace(module, before)
    return f"without {dropped} repeated blocks" if dropped else ""


def _replace(module: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    module._modules.clear()
    module._modules.update(children)


def big(model: nn.Module, limit: float = 100e6) -> bool:
    """Whether float64 parity would not fit a small machine."""
    return sum(p.numel() for p in model.parameters()) > limit


# torchvision

# its auxiliary classifier reads a map of 17 x 17, which takes this many pixels
SIDES = {"inception_v3": 299}


def torchvision() -> dict[str, Builder]:
    """Every classification, video and segmentation builder."""
    zoo = importlib.import_module("torchvision.models")
    parts = (zoo, zoo.video, zoo.segmentation)
    names = [n for part in parts for n in zoo.list_models(module=part)]
    return {n: lambda n=n: _torchvision(zoo, n) for n in names}  # type: ignore[misc]


def _torchvision(zoo: Any, name: str) -> Sample:
    builder = zoo.get_model_builder(name)
    family = builder.__module__.split(".")
    options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    own = inspect.signature(builder).parameters
    options |= {"weights_backbone": None} if "weights_backbone" in own else {}
    options |= {"init_weights": False} if "inception" in name or "googlenet" in name else {}
    x = images(SIDES.get(name, SIDE))
    if "video" in family:
        x = torch.randn(BATCH, 3, 16, 32, 32)
        if name.startswith("mvit"):
            return Sample(_small_mvit(builder, options), (torch.randn(BATCH, 3, 8, 64, 64),))
        if name.startswith("swin"):
            x = torch.randn(BATCH, 3, 4, 64, 64)
        elif name == "s3d":  # it ends in a pooling of 2 x 7 x 7: the least that reaches it
            x = torch.randn(BATCH, 3, 13, 209, 209)
    elif "segmentation" in family:
        options["num_classes"] = 2
        x = images(32)
    elif name.startswith("vit"):
        options["image_size"] = 56 if name == "vit_h_14" else SIDE
    elif name == "maxvit_t":
        maxvit = importlib.import_module("torchvision.models.maxvit").MaxVit
        model = maxvit(
            input_size=(SIDE, SIDE), stem_channels=64, block_channels=[64, 128, 256, 512],
            block_layers=[2, 2, 5, 2], head_dim=32, stochastic_depth_prob=0.0, partition_size=2,
            num_classes=CLASSES,
        )  # fmt: skip
        return Sample(model, (x,), note="64 px, windows of 2")
    if name == "vit_h_14":
        x = images(56)
    model = builder(**options)
    return Sample(model, (x,))


def _small_mvit(builder: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """For 8 frames of 64 x 64; the builders fix 16 of 224 x 224."""
    module = importlib.import_module(builder.__module__)
    make = module._mvit
    small = {"spatial_size": (64, 64), "temporal_size": 8}
    with mock.patch.object(module, "_mvit", lambda **given: make(**(given | small))):
        return builder(**options)


# timm: the smallest member of each family

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


# transformers: small random configs

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"), 2
    ),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "moe_intermediate_size", "d_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_shared_experts"), 2),
    **{"vocab_size": 99, "head_dim": 8, "d_kv": 8, "image_size": 32, "patch_size": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False},
    **{"decoder_start_token_id": 1, "type_vocab_size": 2, "projection_dim": 16},
    **{"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
}
SPEECH: dict[str, Any] = {
    "conv_dim": (16, 16, 16), "conv_stride": (4, 4, 2), "conv_kernel": (8, 4, 4),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0, "apply_spec_augment": False,
}  # fmt: skip
HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
T = 7  # tokens


def _text(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (BATCH, T)), **more}


def _pairs() -> dict[str, Any]:
    return _text(decoder_input_ids=torch.randint(3, 99, (BATCH, T - 2)))


def _pixels() -> dict[str, Any]:
    return {"pixel_values": images(32)}


def _wave() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 800)}


def _mel() -> dict[str, Any]:
    ids = torch.randint(3, 99, (BATCH, T))
    return {"input_features": torch.randn(BATCH, 16, 40), "decoder_input_ids": ids}


def _both() -> dict[str, Any]:
    return _text(**_pixels())


Inputs = Callable[[], dict[str, Any]]
# class: (inputs, what differs from SMALL)
TRANSFORMERS: dict[str, tuple[Inputs, dict[str, Any]]] = {
    "GPT2LMHeadModel": (_text, {}),
    "LlamaForCausalLM": (_text, {}),
    "BertForMaskedLM": (_text, {}),
    "T5ForConditionalGeneration": (_pairs, {}),
    "ViTForImageClassification": (_pixels, {}),
    "Wav2Vec2ForCTC": (_wave, SPEECH),
    "MixtralForCausalLM": (_text, {}),
    "MambaForCausalLM": (_text, {"state_size": 8}),
    "WhisperForConditionalGeneration": (
        _mel, {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20},
    ),
    "GPTNeoXForCausalLM": (_text, {}),
    "MistralForCausalLM": (_text, {}),
    "Qwen2ForCausalLM": (_text, {}),
    "Qwen3ForCausalLM": (_text, {}),
    "Gemma2ForCausalLM": (_text, {"query_pre_attn_scalar": 8}),
    "PhiForCausalLM": (_text, {"num_key_value_heads": 4}),
    "OPTForCausalLM": (_text, {"word_embed_proj_dim": 32}),
    "BloomForCausalLM": (_text, {}),
    "FalconForCausalLM": (_text, {"head_dim": None}),
    "GPTJForCausalLM": (_text, {"rotary_dim": 4}),
    "CohereForCausalLM": (_text, {}),
    "StableLmForCausalLM": (_text, {}),
    "Olmo2ForCausalLM": (_text, {}),
    "Qwen2MoeForCausalLM": (_text, {"shared_expert_intermediate_size": 32}),
    "OlmoeForCausalLM": (_text, {}),
    "GptOssForCausalLM": (_text, {}),
    "DeepseekV3ForCausalLM": (
        _text,
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
         "num_key_value_heads": 4},
    ),
    "SwitchTransformersForConditionalGeneration": (
        _pairs, {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    ),
    "Mamba2ForCausalLM": (
        _text, {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}
    ),
    "FalconMambaForCausalLM": (_text, {"state_size": 8}),
    "RecurrentGemmaForCausalLM": (_text, {"lru_width": 32, "attention_window_size": 16}),
    "JambaForCausalLM": (_text, {"num_hidden_layers": 3, "attn_layer_period": 2,
                                 "attn_layer_offset": 1, "expert_layer_period": 2,
                                 "expert_layer_offset": 1, "use_mamba_kernels": False}),
    "BambaForCausalLM": (_text, {**HYBRID, "attn_layer_indices": [1]}),
    "RwkvForCausalLM": (_text, {"attention_hidden_size": 32}),
    "Lfm2ForCausalLM": (_text, {"full_attn_idxs": [1]}),
    "RobertaForMaskedLM": (_text, {}),
    "DistilBertForMaskedLM": (_text, {}),
    "AlbertForMaskedLM": (_text, {"embedding_size": 16}),
    "ElectraForMaskedLM": (_text, {"embedding_size": 16}),
    "DebertaV2ForMaskedLM": (_text, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "MPNetForMaskedLM": (_text, {}),
    "ModernBertForMaskedLM": (_text, {}),
    "XLNetLMHeadModel": (_text, {"d_head": 8, "max_position_embeddings": None}),
    "LongformerForMaskedLM": (_text, {"attention_window": 4}),
    "BigBirdForMaskedLM": (_text, {"attention_type": "original_full"}),
    "FNetForMaskedLM": (_text, {}),
    "FunnelForMaskedLM": (_text, {"block_sizes": [1, 1], "d_head": 8, "num_hidden_layers": None}),
    "ConvBertForMaskedLM": (_text, {"embedding_size": 32}),
    "MobileBertForMaskedLM": (
        _text, {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    ),
    "SqueezeBertForMaskedLM": (_text, {"embedding_size": 32}),
    "PerceiverForMaskedLM": (
        _text,
        {"num_latents": 5, "d_latents": 16, "qk_channels": 16, "v_channels": 16,
         "num_self_attends_per_block": 2, "num_cross_attention_heads": 2,
         "num_self_attention_heads": 2},
    ),
    "BartForConditionalGeneration": (_pairs, {}),
    "PegasusForConditionalGeneration": (_pairs, {}),
    "MarianMTModel": (_pairs, {}),
    "M2M100ForConditionalGeneration": (_pairs, {}),
    "LEDForConditionalGeneration": (
        _pairs, {"attention_window": 4, "max_encoder_position_embeddings": 64,
                 "max_decoder_position_embeddings": 64},
    ),
    "DeiTForImageClassification": (_pixels, {}),
    "BeitForImageClassification": (_pixels, {}),
    "Dinov2ForImageClassification": (_pixels, {}),
    "SwinForImageClassification": (
        _pixels, {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2,
                  "patch_size": 4, "num_layers": None, "hidden_size": None,
                  "num_attention_heads": None, "num_hidden_layers": None},
    ),
    "ConvNextForImageClassification": (
        _pixels, {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "patch_size": 4,
                  "num_hidden_layers": None}
    ),
    "ResNetForImageClassification": (
        _pixels, {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}
    ),
    "SegformerForSemanticSegmentation": (
        _pixels, {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1],
                  "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 16,
                  "patch_size": None},
    ),
    "PvtForImageClassification": (
        _pixels, {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1],
                  "num_attention_heads": [1, 2, 2, 2], "patch_size": None},
    ),
    "MobileViTForImageClassification": (
        _pixels, {"hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 8, 12, 16, 16, 16, 32],
                  "patch_size": 2},
    ),
    "LevitForImageClassification": (
        lambda: {"pixel_values": images(64)},
        {"hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "num_attention_heads": [2, 3, 4],
         "key_dim": [8, 8, 8], "image_size": 64, "patch_size": 16},
    ),
    "ViTMAEForPreTraining": (
        lambda: _pixels() | {"noise": torch.rand(BATCH, 16)},
        {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 32,
         "decoder_num_attention_heads": 2},
    ),
    "CLIPModel": (_both, {"text_config": {}, "vision_config": {}}),
    "SiglipModel": (_both, {"text_config": {}, "vision_config": {}}),
    "HubertForCTC": (_wave, SPEECH),
    "WavLMForCTC": (_wave, SPEECH),
    "Data2VecAudioForCTC": (_wave, {**SPEECH, "conv_pos_kernel_size": 3,
                                    "num_conv_pos_embeddings": 2}),
    "SEWForCTC": (_wave, SPEECH),
    "ASTForAudioClassification": (
        lambda: {"input_values": torch.randn(BATCH, 24, 16)},
        {"num_mel_bins": 16, "max_length": 24, "patch_size": 8, "frequency_stride": 8,
         "time_stride": 8},
    ),
    "Speech2TextForConditionalGeneration": (
        lambda: _mel() | {"input_features": torch.randn(BATCH, 40, 16)},
        {"input_feat_per_channel": 16, "conv_channels": 16, "max_source_positions": 64,
         "max_target_positions": 64},
    ),
}  # fmt: skip


def transformers() -> dict[str, Builder]:
    """Decoders, encoders, both, vision, audio, mixtures of experts and state spaces."""
    zoo = importlib.import_module("transformers")
    zoo.logging.set_verbosity_error()
    return {n: lambda n=n: _transformers(zoo, n) for n in TRANSFORMERS if hasattr(zoo, n)}  # type: ignore[misc]


def _transformers(zoo: Any, name: str) -> Sample:
    cls = getattr(zoo, name)
    inputs, own = TRANSFORMERS[name]
    config = cls.config_class(**_small(cls.config_class, own))
    _calm(config)
    if any("expert" in k for k in vars(config)) and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "batched_mm"  # the default kernel has no float64
    return Sample(cls(config), (), inputs() | {"return_dict": True})


def _small(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    default = config()
    parts = {k: type(getattr(default, k)) for k in ("text_config", "vision_config")
             if hasattr(default, k)}  # fmt: skip
    found = {k: v for k, v in SMALL.items() if hasattr(default, k) and k not in own}
    found |= {k: v for k, v in own.items() if v is not None and k not in parts}
    return found | {"num_labels": CLASSES} | {k: _small(c, own[k]) for k, c in parts.items()}


def _calm(config: Any) -> None:
    """No dropout in a config and in those inside it."""
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
        elif key.endswith("_config") and hasattr(value, "__dict__"):
            _calm(value)


# everything else: models as people write them by hand


class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.rnn = cell(8, 12, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(24, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.rnn(self.embed(tokens))
        return self.out(h[:, -1])


class _MessagePassing(nn.Module):
    """Two rounds on one graph: gather at the sources, a message net, index_add at the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.message = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])
        self.update = nn.ModuleList([nn.GRUCell(8, 8), nn.GRUCell(8, 8)])
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        n, nodes, _ = x.shape
        h = torch.relu(self.embed(x))
        source, target = edges[0], edges[1]
        for message, update in zip(self.message, self.update, strict=True):
            ends = torch.cat([h.index_select(1, source), h.index_select(1, target)], -1)
            total = torch.zeros_like(h).index_add(1, target, torch.relu(message(ends)))
            h = update(total.reshape(n * nodes, 8), h.reshape(n * nodes, 8)).view(n, nodes, 8)
        return self.out(h.mean(1))


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.join, self.out = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        return self.out(F.relu(self.join(torch.cat([a, self.up(self.middle(b))], 1))))


class _Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh())
        self.out = nn.Linear(8, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out((self.net(a) - self.net(b)).abs())


class _Experts(nn.Module):
    """Top-2 of four experts, dense: each computes everything, the gate is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(8, 12), nn.Linear(12, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)) for _ in range(4)
        )
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        weight, chosen = self.gate(h).softmax(-1).topk(2, -1)
        gates = torch.zeros(len(h), 4, dtype=h.dtype).scatter(1, chosen, weight)
        every = torch.stack([e(h) for e in self.experts], 1)
        return self.out(h + (gates[..., None] * every).sum(1))


class _Cells(nn.Module):
    """Two cells in a loop that its author wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(12, CLASSES)
        self.lstm, self.gru = nn.LSTMCell(8, 12), nn.GRUCell(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = c = g = x.new_zeros(x.shape[0], 12)
        for t in range(tokens.shape[1]):
            h, c = self.lstm(x[:, t], (h, c))
            g = self.gru(h, g)
        return self.out(g)


class _Towers(nn.Module):
    """A contrastive loss on all pairs of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.to_a, self.to_b = nn.Linear(12, 5), nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = F.normalize(self.to_a(self.a(x)), dim=-1)
        b = F.normalize(self.to_b(self.b(y)), dim=-1)
        pairs = a @ b.t() * self.scale.exp()
        own = pairs.diagonal()
        return (pairs.logsumexp(0) - own).mean() + (pairs.logsumexp(1) - own).mean()


class _OwnLoss(nn.Module):
    """Returns its loss and its prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.out(self.net(x))
        return F.cross_entropy(logits, y), logits


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 24),
        nn.ReLU(), nn.Linear(24, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)),
    )  # fmt: skip


def _edges() -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]])


def _labels() -> Tensor:
    return torch.randint(0, CLASSES, (BATCH,))


def other() -> dict[str, Builder]:
    """Recurrent nets, graphs, autoencoders, twins, experts, a loss inside the model."""
    tokens = torch.randint(0, 20, (BATCH, 5))
    return {
        "gru": lambda: Sample(_Recurrent(nn.GRU), (tokens,)),
        "lstm": lambda: Sample(_Recurrent(nn.LSTM), (tokens,)),
        "rnn": lambda: Sample(_Recurrent(nn.RNN), (tokens,)),
        "cells": lambda: Sample(_Cells(), (tokens,)),
        "towers": lambda: Sample(_Towers(), (torch.randn(BATCH, 8), torch.randn(BATCH, 6))),
        "message passing": lambda: Sample(_MessagePassing(), (torch.randn(BATCH, 6, 5), _edges())),
        "autoencoder": lambda: Sample(_autoencoder(), (images(8, 1),)),
        "u-net": lambda: Sample(_UNet(), (images(8, 1),)),
        "siamese": lambda: Sample(_Siamese(), (torch.randn(BATCH, 8), torch.randn(BATCH, 8))),
        "experts": lambda: Sample(_Experts(), (torch.randn(BATCH, 8),)),
        "own loss": lambda: Sample(_OwnLoss(), (torch.randn(BATCH, 8), _labels())),
        "nn.Transformer": lambda: Sample(
            nn.Transformer(16, 2, 2, 2, 24, dropout=0.0, batch_first=True),
            (torch.randn(BATCH, 5, 16), torch.randn(BATCH, 4, 16)),
        ),
    }


ZOOS: dict[str, Callable[[], dict[str, Builder]]] = {
    "torchvision": torchvision,
    "timm": timm,
    "transformers": transformers,
    "other": other,
}
