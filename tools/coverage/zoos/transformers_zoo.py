"""transformers: small random configs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tools.coverage.zoos.sample import BATCH, CLASSES, Builder, Sample, images

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


def _masked_pairs() -> dict[str, Any]:
    return _pairs() | {"attention_mask": torch.ones(BATCH, T, dtype=torch.long)}


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
        # under a tracer its encoder makes no mask of its own
        _masked_pairs, {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
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
