"""Fields of configurations whose names do not tell what a tiny model needs."""

from typing import Any

_BEIT = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 16}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_RT_DETR = {
    "backbone_config": _RESNET,
    "encoder_in_channels": [16, 32, 32],
    "decoder_in_channels": [32, 32, 32],
    "encoder_hidden_dim": 32,
    "num_denoising": 0,
}
_PP_LAYOUT = {
    "x4_feat_dim": 16,
    "encoder_in_channels": [32, 32, 32],
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
}
_MASKED_IMAGE = {"encoder_stride": 8}
_DETR = {"backbone_config": _RESNET, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
_SERIES = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "num_time_features": 1}
_SEGFORMER = {"hidden_sizes": [16, 32, 32, 32], "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 32}
_GLPN = _SEGFORMER | {"decoder_hidden_size": 64}  # its head takes nothing else
_DPT = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 32, 32]}
_EFFICIENT_NET = {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "in_channels": [32, 8],
    "out_channels": [8, 8],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "expand_ratios": [1, 2],
    "num_block_repeats": [1, 1],
    "depthwise_padding": [],
    "hidden_dim": 1280,
}
_EXPLICIT_HEAD_DIM = {"head_dim": 8}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 1.0,
    }
}
_SWIN = {"window_size": 2, "image_size": 64}

OVERRIDES: dict[str, dict[str, Any]] = {
    "BeitConfig": _BEIT,
    "DFineConfig": _RT_DETR,
    "Deimv2Config": _RT_DETR,
    "DeiTConfig": _MASKED_IMAGE,
    "Cosmos3EdgeTextConfig": _MROPE,
    "DonutSwinConfig": {"window_size": 2, "depths": [1, 1], "num_heads": [2, 2]},
    "GPTJConfig": {"rotary_dim": 4},
    "GlmOcrTextConfig": _MROPE,
    "GlmImageTextConfig": _MROPE,
    "Glm46VTextConfig": _MROPE,
    "Glm4vMoeTextConfig": _MROPE,
    "Glm4vTextConfig": _MROPE,
    "PaddleOCRTextConfig": _MROPE,
    "Qwen2VLTextConfig": _MROPE,
    "Qwen2_5_VLTextConfig": _MROPE,
    "Qwen2_5OmniTextConfig": _MROPE,
    "AutoformerConfig": _SERIES,
    "InformerConfig": _SERIES,
    "TimeSeriesTransformerConfig": _SERIES,
    "PerceiverConfig": {
        "d_latents": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 1,
        "num_blocks": 1,
        "num_cross_attention_heads": 1,
        "max_position_embeddings": 12,
        "image_size": 32,
    },
    "HGNetV2Config": {
        "hidden_sizes": [16, 32, 32, 32],
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 16, 32, 32],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 32, 32, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
    "GLPNConfig": _GLPN,
    "SegformerConfig": _SEGFORMER,
    "Sapiens2Config": {"head_config": {}},
    "CanineConfig": {"num_hash_buckets": 64},
    "DPTConfig": _DPT,
    "Tipsv2DptConfig": _DPT,
    "ChameleonConfig": {"vocabulary_map": {"<image>": 3} | {f"IMGIMG{letter}Z": 4 for letter in "AB"}},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "CohereCompassTextConfig": {"rope_parameters": None},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [16, 16]},
    "Glm5NextTextConfig": {"num_key_value_heads": 4},
    "HieraConfig": {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "HunYuanVLTextConfig": _EXPLICIT_HEAD_DIM,
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "PPDocLayoutV2Config": _PP_LAYOUT,
    "PPDocLayoutV3Config": _PP_LAYOUT,
    "TvpConfig": {"visual_prompt_size": 8, "max_img_size": 32},
    "ViltConfig": {"num_images": 2, "modality_type_vocab_size": 3},
    "Emu3Config": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4}},
    "LiltConfig": {"hidden_size": 48},
    "EfficientNetConfig": _EFFICIENT_NET,
    "AlignVisionConfig": _EFFICIENT_NET,
    "LayoutLMv3Config": {"coordinate_size": 8, "shape_size": 0},
    "LwDetrViTConfig": {"num_windows": 4, "window_block_indices": [0]},
    "Swin2SRConfig": _SWIN,
    "SwinConfig": _SWIN,
    "Swinv2Config": _SWIN,
    "RTDetrConfig": _RT_DETR,
    "RTDetrV2Config": _RT_DETR,
    "RfDetrConfig": {"group_detr": 3},
    "LwDetrConfig": {"group_detr": 3, "projector_scale_factors": [1.0]},
    "GroundingDinoConfig": _DETR,
    "MMGroundingDinoConfig": _DETR,
    "ViTConfig": _MASKED_IMAGE,
    "BitConfig": {"num_groups": 4},
    "BridgeTowerVisionConfig": {"hidden_size": 64},  # one attention head for each 64
    "CodeGenConfig": {"rotary_dim": 4},
    "ConditionalDetrConfig": _DETR,
    "DabDetrConfig": _DETR,
    "Data2VecVisionConfig": _BEIT,
    "DeformableDetrConfig": _DETR | {"d_model": 64},  # 32 groups need more than one value each
    "DetrConfig": _DETR,
    "Dots1Config": {"n_shared_experts": 1},
    "EsmConfig": {"mask_token_id": 3},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "HunYuanDenseV1Config": _EXPLICIT_HEAD_DIM,
    "HunYuanMoEV1Config": _EXPLICIT_HEAD_DIM,
    "Mamba2Config": {"hidden_size": 32, "num_heads": 8, "head_dim": 8},
    "MinistralConfig": _EXPLICIT_HEAD_DIM,
    "NemotronConfig": _EXPLICIT_HEAD_DIM | {"num_key_value_heads": 2},
    "OmDetrTurboConfig": _DETR,
    "ReformerConfig": {
        "attn_layers": ["local", "local"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 3],
        "local_attn_chunk_length": 4,
        "attention_head_size": 8,
        "is_decoder": True,
    },
    "TableTransformerConfig": _DETR,
    "Zamba2Config": {"layers_block_type": ["mamba", "hybrid"]},
    "ZambaConfig": {"num_hidden_layers": 6, "layers_block_type": None},
}
"""Class name of a configuration → what its fields are instead of what their names suggest."""
