"""Tiny configurations of any head.

A head's default configuration is shrunk by the names of its fields, sub-configurations too; ``overrides.yaml`` has what
that gets wrong. A head that cannot be built this way is reported, not forced.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

VOCAB = 128
NUM_CLASSES = 3
IMAGE_SIZE = 32

OVERRIDES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("overrides.yaml").read_text())
"""Class of a configuration → fields and their values."""
_LAYERS = 2
_SIZES: list[tuple[str, int]] = [
    # Heads before sizes: the first match counts.
    (r"(key_value|kv)_(attention_)?(n_)?heads$", 2),
    (r"(heads|n_head|n_heads|num_heads)$|^num_attention_heads|_heads_per", 4),
    (r"(qk_rope|qk_nope|v|index|linear_key|linear_value|mamba)?_?head_dim$|^(d_kv|d_head|kv_channels|dim_head)$", 8),
    (r"^(num_.*layers|n_layers?|layers|.*_layers|depth|.*_depth|num_blocks)$", _LAYERS),
    (r"vocab_size", VOCAB),
    (r"(intermediate|ffn|feedforward|feed_forward|mlp).*(size|dim)$|^(d_ff|n_inner|d_inner|dff|dim_ff)$", 64),
    (r"lora_rank$", 16),
    (r"^(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|embedding_dim|emb_dim|dim|width)$", 32),
    (r"(hidden_size|hidden_dim|embed_dim|embedding_size|projection_dim|embedding_dim|embed_hidden_size)", 32),
    (r"(proj_size|proj_dim|feature_size|channels|output_dim|model_dim|pooler_output_size)$", 32),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|.*num_experts)$", 4),
    (r"^(num_experts_per_tok|moe_topk|moe_k|top_k_experts|moe_top_k)$", 2),
    (r"^(n_group|topk_group)$", 1),
    (r"^(image_size|img_size|pretrain_image_size|input_size|max_image_size)$", IMAGE_SIZE),
    (r"^patch_size$", 8),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_.*positions|max_.*position_embeddings)$", 512),
    (r"^(num_queries|num_detection_tokens|two_stage_num_proposals|num_query_tokens|train_num_points)$", 12),
    (r"^(num_frames|frames_per_clip)$", 4),
    (r"(_size|_dim|_rank|_units|_width)$", 32),
]
_KEPT = re.compile(
    r"^(num_channels|in_channels|in_chans|channels|num_channels_out|out_channels|kernel_size|window_size|chunk_size.*|"
    r"type_vocab_size|.*kernel_size|.*kernel_dim|stride|visual_pos_dim|tubelet_size|.*merge_size|temporal_patch_size|"
    r"audio_channels|input_channels|num_input_channels|block_size|batch_size|.*_batch_size|spatial_merge_size|"
    r"query_dim|.*_query_dim|modality_type_vocab_size|task_type_vocab_size|freq_size|speaker_embedding_size|"
    r"hidden_size_per_layer_input|.*modulation.*|pool_size|num_pos_feats|dim_bbox|expert_capacity|crop_size)$"
)
_TOKEN = re.compile(r"(_token_id|_token_index|_token_idx|(start|end|pad|bos|eos|mask|unk|cls|sep)_(id|index))$")
_RANDOM = re.compile(r"drop|^(mask_time_prob|mask_feature_prob|jitter|.*jitter_noise|.*noise_std)$")
_ALWAYS = {"vocab_size": VOCAB, "pad_token_id": 0, "n_routed_experts": 4, "num_experts_per_tok": 2}
_FLAGS_OFF = {"use_cache", "apply_spec_augment", "output_router_logits", "use_timm_backbone", "use_pretrained_backbone"}


def tiny_config(config_class: type[PretrainedConfig], **fixed: Any) -> PretrainedConfig:
    """A configuration of the class with everything small and nothing random.

    Args:
        config_class: Of transformers.
        **fixed: Fields that are to have this value.
    """
    return _shrink(config_class(), fixed)


def _shrink(default: PretrainedConfig, fixed: dict[str, Any]) -> PretrainedConfig:
    config_class = type(default)
    fixed = OVERRIDES.get(config_class.__name__, {}) | fixed
    options: dict[str, Any] = {}
    tokens = iter(range(3, VOCAB))
    for field in dataclasses.fields(config_class):
        if field.name in fixed or not field.init:
            continue
        declared = None if field.default is dataclasses.MISSING else field.default
        try:
            value = getattr(default, field.name, None)
        except Exception:  # it differs between layers, and each type of configuration says so in its own way
            value = declared
        if isinstance(value, PretrainedConfig):
            options[field.name] = _shrink(value, {})
        elif field.name in _ALWAYS:
            options[field.name] = _ALWAYS[field.name]
        elif isinstance(value, bool) or value is None:
            if field.name in _FLAGS_OFF and value:
                options[field.name] = False
        elif _RANDOM.search(field.name) and isinstance(value, int | float):
            options[field.name] = 0.0 if isinstance(value, float) else 0
        elif isinstance(value, int) and _TOKEN.search(field.name) and value >= 0:
            options[field.name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(
                field.name, value if value < 3 else next(tokens)
            )
        elif declared is not None and isinstance(value, int):
            small = _small(field.name, value)
            if small != value:
                options[field.name] = small
        elif declared is not None and isinstance(value, list | tuple) and value:
            options[field.name] = type(value)(_small_list(field.name, list(value)))
        elif isinstance(value, float) and field.name in ("initializer_range", "init_std"):
            options[field.name] = 0.1
    if getattr(default, "_out_features", None) and not {"out_features", "out_indices"} & set(fixed):
        stages = list(default.out_features)
        if not hasattr(default, "depths"):  # every layer is a stage
            stages = [f"stage{i + 1}" for i in range(len(stages))]
            options["num_hidden_layers"] = len(stages)
        options["out_features"] = stages
    if re.search("expert", " ".join(options)):
        options["experts_implementation"] = "eager"  # the default one has no float64 kernel
    if "kv_lora_rank" in options and "num_key_value_heads" in options:
        options["num_key_value_heads"] = options["num_attention_heads"]  # one latent for all
    config = config_class(**options | fixed)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
        config.pad_token_id = 0
    return config


def _small(name: str, value: int) -> int:
    if _KEPT.match(name):
        return value
    for pattern, small in _SIZES:
        if re.search(pattern, name):
            return min(value, small)
    return value


def _small_list(name: str, values: list[Any]) -> list[Any]:
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return values
    if re.search(r"depths|num_blocks|layers_per|num_conv|layer_depths", name):
        return [1] * len(values)
    if re.search(r"heads", name):
        return [min(value, 2) for value in values]
    if re.search(r"hidden_sizes|embed_dims|dims|channels|filters|widths", name):
        return [16 * (i + 1) if value > 16 else value for i, value in enumerate(values)]
    if re.search(r"index|indic", name):
        return [0, 1][: len(values)] if len(values) > 1 and max(values) > 1 else [min(value, 1) for value in values]
    if re.search(r"image_size|img_size", name):
        return [IMAGE_SIZE] * len(values)
    return values
