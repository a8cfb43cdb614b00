"""Tiny random-weight models of every family, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fsdp_qlora.parallel import MemorySettings

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "mistral": {"sliding_window": 16, "tie_word_embeddings": False},
    "qwen2": {
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 24,
        "sliding_window": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"head_dim": 24, "sliding_window": 16, "query_pre_attn_scalar": 24},
    "phi3": {"sliding_window": 24, "tie_word_embeddings": False},
    "gemma": {"head_dim": 24},
    "ministral3": {
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "olmo2": {"tie_word_embeddings": False},
    "olmo3": {"sliding_window": 16, "tie_word_embeddings": False},
    "granite": {
        "tie_word_embeddings": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 3.0,
    },
    "cohere": {"logit_scale": 0.3},
    "cohere_qk_norm": {"model_type": "cohere", "use_qk_norm": True, "tie_word_embeddings": False},
    "cohere2": {"logit_scale": 0.3, "sliding_window": 16},
    "smollm3": {"no_rope_layer_interval": 2},
    "glm": {"head_dim": 16, "tie_word_embeddings": False},
    "glm4": {"head_dim": 16, "tie_word_embeddings": False},
    "exaone4": {"sliding_window": 16, "tie_word_embeddings": False},
    "ernie4_5": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 24,
        "moe_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 72,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "tie_word_embeddings": False},
}
"""Settings of a family's tiny model beyond COMMON; model_type is the key unless given."""


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny random model of a family as safetensors and return its folder."""
    settings = {**COMMON, **FAMILIES[family], **changes}
    model_type = settings.pop("model_type", family)
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # initial values leave biases at 0 and norms at 1, and logits too small to tell models apart
            parameter.add_(torch.randn_like(parameter) * (0.05 if "norm" in name else 0.1))
    model.to(dtype).save_pretrained(folder)
    return folder


def memory(
    *, cpu_offload: bool = False, activation_checkpointing: bool = False, activation_offload: bool = False
) -> MemorySettings:
    """Return the memory settings of a tiny model: everything offloaded or checkpointed, or nothing."""
    blocks = COMMON["num_hidden_layers"]
    return MemorySettings(
        offload_blocks=blocks if cpu_offload else 0,
        offload_vocabulary=cpu_offload,
        offload_lora=cpu_offload,
        checkpoint_blocks=blocks if activation_checkpointing else 0,
        offload_activations=activation_offload,
    )
