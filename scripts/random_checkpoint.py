"""Make a checkpoint with random weights of a real model's shape, quantised in bitsandbytes' format, without a download.

    python scripts/random_checkpoint.py --shape llama-70b --folder /tmp/llama-70b [--num_blocks 80]

The shapes are llama-8b, llama-70b, and the mixtures of experts qwen3-30b-a3b and qwen3-235b-a22b. The 4-bit codes are random
and the scales lie around 0.05, so that values stay finite through all blocks. A tokenizer of single bytes and a text dataset
(data.jsonl) are saved beside the weights, so that train.py runs on the folder.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import fire
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.weights.bnb_format import describe

SHAPES = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


MOE_SHAPES = {
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
    },
    "qwen3-235b-a22b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
}


def model_config(shape: str, num_blocks: int | None = None) -> PretrainedConfig:
    """Return the configuration of a shape of either kind."""
    return moe_config(shape, num_blocks) if shape in MOE_SHAPES else llama_config(shape, num_blocks)


def moe_config(shape: str, num_blocks: int | None = None) -> Qwen3MoeConfig:
    """Return the configuration of a Qwen3 mixture of experts of this size."""
    settings = dict(MOE_SHAPES[shape])
    if num_blocks is not None:
        settings["num_hidden_layers"] = num_blocks
    return Qwen3MoeConfig(
        **settings,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


def llama_config(shape: str, num_blocks: int | None = None) -> LlamaConfig:
    """Return the configuration of a Llama 3 model of this size."""
    settings = dict(SHAPES[shape])
    if num_blocks is not None:
        settings["num_hidden_layers"] = num_blocks
    return LlamaConfig(
        **settings,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def quantized_tensors(name: str, out_features: int, in_features: int, device: str) -> dict[str, Tensor]:
    """Return what bitsandbytes would save for a matrix [out, in], with random codes."""
    layout = Layout(out_features, in_features)
    codes = torch.randint(0, 256, (layout.codes.size, 1), dtype=torch.uint8, device=device)
    absmax = 0.03 + 0.04 * torch.rand(layout.num_blocks, device=device)
    state = describe(absmax, layout, torch.bfloat16).as_dict(packed=True)
    # clones, because matrices share their code tables and safetensors refuses to save such tensors
    return {name: codes.cpu(), **{f"{name}.{part}": value.cpu().clone() for part, value in state.items()}}


def block_shapes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Return the matrices of a decoder block that are quantised by name, [out, in]."""
    hidden = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
    }
    num_experts = getattr(config, "num_experts", 0)
    prefixes = [f"mlp.experts.{expert}" for expert in range(num_experts)] or ["mlp"]
    inner = config.moe_intermediate_size if num_experts else config.intermediate_size
    parts = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return attention | {f"{prefix}.{part}": shape for prefix in prefixes for part, shape in parts.items()}


def block_tensors(config: PretrainedConfig, index: int, device: str, quantized: bool) -> dict[str, Tensor]:
    """Return the tensors of one decoder block."""
    prefix = f"model.layers.{index}."
    tensors: dict[str, Tensor] = {}
    for name, (out_features, in_features) in block_shapes(config).items():
        key = f"{prefix}{name}.weight"
        if quantized:
            tensors |= quantized_tensors(key, out_features, in_features, device)
        else:
            tensors[key] = (torch.randn(out_features, in_features, device=device) * 0.02).bfloat16().cpu()
    norms = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
    if num_experts := getattr(config, "num_experts", 0):
        router = torch.randn(num_experts, config.hidden_size, device=device) * 0.02
        tensors[f"{prefix}mlp.gate.weight"] = router.bfloat16().cpu()
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    for name, width in norms.items():
        tensors[f"{prefix}{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    return tensors


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of single bytes."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def save_data(folder: Path, num_rows: int = 400, characters: int = 4000) -> None:
    """Save random text."""
    source = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz     "
    rows = ({"text": "".join(source.choices(letters, k=characters))} for _ in range(num_rows))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(shape: str, folder: str, num_blocks: int | None = None, quantized: bool = True) -> None:
    """Write the checkpoint, in nf4 or else in bf16, tokenizer and data of a shape into a folder."""
    started = time.monotonic()
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = model_config(shape, num_blocks)
    weight_map: dict[str, str] = {}

    def save(tensors: dict[str, Tensor], file: str) -> None:
        save_file(tensors, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(config.num_hidden_layers):
        save(block_tensors(config, index, device, quantized), f"block-{index:03d}.safetensors")
    size = (config.vocab_size, config.hidden_size)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        save({name: (torch.randn(size, device=device) * 0.02).bfloat16().cpu()}, f"{name.split('.')[-2]}.safetensors")
    save({"model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16)}, "norm.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if quantized:
        config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
    config.save_pretrained(target)
    save_tokenizer(target)
    save_data(target)
    size_gib = sum(file.stat().st_size for file in target.iterdir()) / 2**30
    print(
        f"{shape}, {config.num_hidden_layers} blocks: {size_gib:.1f} GiB in {time.monotonic() - started:.0f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    fire.Fire(make)
