"""Architectures of Hugging Face's transformers, small and with random weights, each from a configuration of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WORDS = {"vocab_size": 60, **SPECIAL}
ENCODER = {**WIDE, **WORDS, "max_position_embeddings": 40}
DECODER = {**ENCODER, "num_key_value_heads": 2}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}

# By architecture, the options of its configuration.
LANGUAGE: dict[str, dict[str, Any]] = {
    "AlbertForSequenceClassification": {**ENCODER, "embedding_size": 16},
    "BartForConditionalGeneration": {
        **WORDS,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 40,
    },
    "BertForSequenceClassification": ENCODER,
    "BloomForCausalLM": {**WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "DebertaForSequenceClassification": {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "DebertaV2ForSequenceClassification": {
        **ENCODER,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
    },
    "DistilBertForSequenceClassification": {**WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "ElectraForSequenceClassification": {**ENCODER, "embedding_size": 16},
    "FNetForSequenceClassification": ENCODER,
    "FalconForCausalLM": ENCODER,
    "GPT2LMHeadModel": {**WORDS, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "use_cache": False},
    "GPTNeoXForCausalLM": ENCODER,
    "Gemma2ForCausalLM": {**DECODER, "head_dim": 8},
    "LlamaForCausalLM": DECODER,
    "Mamba2ForCausalLM": {
        **WORDS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 4,
    },
    "MambaForCausalLM": {**WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "MistralForCausalLM": DECODER,
    "MixtralForCausalLM": {**DECODER, "num_local_experts": 4, "experts_implementation": "eager"},
    "ModernBertForSequenceClassification": {**ENCODER, "cls_token_id": 3, "sep_token_id": 4},
    "MptForCausalLM": {"vocab_size": 60, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "OPTForCausalLM": {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "PhiForCausalLM": ENCODER,
    "Qwen3ForCausalLM": {**DECODER, "head_dim": 8},
    "RobertaForSequenceClassification": ENCODER,
    "T5ForConditionalGeneration": {
        **WORDS,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "XLNetForSequenceClassification": {**WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}
PATCHES = {**WIDE, "image_size": 64, "patch_size": 16}
WINDOWS = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
}
VISION: dict[str, dict[str, Any]] = {
    "BeitForImageClassification": {
        **PATCHES,
        "use_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
    },
    "ConvNextV2ForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "CvtForImageClassification": {
        "depth": [1, 2, 3],
        "drop_path_rate": [0.0, 0.0, 0.0],
        "embed_dim": [8, 16, 24],
        "num_heads": [1, 2, 3],
    },
    "DeiTForImageClassification": PATCHES,
    "Dinov2ForImageClassification": PATCHES,
    "LevitForImageClassification": {
        "image_size": 64,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "MobileViTForImageClassification": {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
        "num_attention_heads": 4,
    },
    "PoolFormerForImageClassification": STAGES,
    "PvtForImageClassification": {
        "image_size": 64,
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "num_attention_heads": [1, 2, 3, 4],
    },
    "SegformerForImageClassification": {**STAGES, "num_attention_heads": [1, 1, 2, 2]},
    "SwinForImageClassification": WINDOWS,
    "Swinv2ForImageClassification": WINDOWS,
    "ViTForImageClassification": PATCHES,
}


def build(name: str) -> nn.Module:
    """An architecture by its name, with random weights."""
    import transformers

    kind = getattr(transformers, name)
    net = kind(kind.config_class(**(LANGUAGE | VISION)[name]))
    return SequenceToItself(net) if name.endswith("ConditionalGeneration") else net


class SequenceToItself(nn.Module):
    """An encoder and a decoder that both read the same tokens."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Any:
        return self.net(tokens, decoder_input_ids=tokens)
