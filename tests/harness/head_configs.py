"""Options for the configuration of each tiny model: two layers, no dropout, and losses that differ clearly."""

from tests.harness.head_rows import (
    BOS,
    EOS,
    IMAGE,
    IMAGE_SIZE,
    LENGTH,
    NUM_CLASSES,
    NUM_MELS,
    PAD,
    PATCH_SIZE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
)

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_WIDE = {"initializer_range": 0.2}  # ten times the usual spread: the losses of different rows differ clearly
_SIZES = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
_SMALL = _IDS | _WIDE | _SIZES | {"vocab_size": VOCAB, "num_labels": NUM_CLASSES}


def _none_of(*dropouts: str) -> dict[str, float]:
    return dict.fromkeys(dropouts, 0.0)


LLAMA = _SMALL | {"num_key_value_heads": 2}
# The default implementation of experts has no float64 kernel.
EXPERTS = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
QWEN3_MOE = EXPERTS | {"head_dim": 8, "moe_intermediate_size": 16}
GPT2 = _SMALL | _none_of("resid_pdrop", "embd_pdrop", "attn_pdrop")
BERT = _SMALL | _none_of("hidden_dropout_prob", "attention_probs_dropout_prob")
VIT = BERT | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "encoder_stride": PATCH_SIZE}
T5 = _SMALL | {"num_decoder_layers": 2, "d_kv": 8, "d_ff": 32, "dropout_rate": 0.0, "decoder_start_token_id": BOS}
BART = (
    _IDS
    | {"vocab_size": VOCAB, "d_model": 16, "init_std": 0.2, "dropout": 0.0, "decoder_start_token_id": BOS}
    | dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
)
WHISPER = BART | {"num_mel_bins": NUM_MELS, "max_source_positions": LENGTH, "begin_suppress_tokens": None}
_QWEN_VISION = (
    _WIDE
    | {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    | {"patch_size": 2, "temporal_patch_size": 1, "window_size": 8, "fullatt_block_indexes": [1]}
)
QWEN_VL = {
    "text_config": LLAMA | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "vision_config": _QWEN_VISION,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
WAV2VEC2 = (
    _SMALL
    | {"conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "classifier_proj_size": 16}
    | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    | _none_of("hidden_dropout", "activation_dropout", "attention_dropout", "final_dropout", "layerdrop")
    | {"apply_spec_augment": False}  # masks at random
)
SEGFORMER = (
    BERT
    | {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
    }
    | {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}
    | _none_of("classifier_dropout_prob", "drop_path_rate")
)
BEIT = (
    VIT
    | {"num_hidden_layers": 3, "out_indices": [0, 1, 2, 3]}  # it wants four feature maps
    | {"pool_scales": [1, 2], "auxiliary_channels": 16, "drop_path_rate": 0.0, "initializer_range": 0.1}
)
