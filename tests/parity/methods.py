"""The kinds of LoRA that are compared with PEFT, and what is measured of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from fsdp_qlora.adapters import open_adapter, save_adapter
from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.quant.adapt import LoraSettings
from tests.batches import random_ids, whole_rows
from tests.parity import reference
from tests.parity.reference import NF4, Pair
from tests.tiny import COMMON

TOKENS = 64

METHODS = {
    "rsLoRA": LoraSettings(8, 16.0, use_rslora=True),
    "targets by name": LoraSettings(8, 16.0, target_modules="self_attn.v_proj,mlp.down_proj"),
    "targets by regular expression": LoraSettings(8, 16.0, target_modules=r"model\.layers\.[02]\..*\.(q|up)_proj"),
    "some blocks": LoraSettings(8, 16.0, target_modules="q_proj,down_proj", layers=(1, 3)),
    "rank and alpha by layer": LoraSettings(
        8,
        16.0,
        rank_pattern=(("q_proj", 4), (r"model\.layers\.[01]\.mlp\..*", 24)),
        alpha_pattern=(("model.layers.2.mlp.up_proj", 40.0), (".*self_attn.*", 12.0)),
    ),
    "rsLoRA, rank and alpha by layer": LoraSettings(
        8, 16.0, use_rslora=True, rank_pattern=(("o_proj", 16),), alpha_pattern=(("o_proj", 24.0),)
    ),
    "DoRA": LoraSettings(8, 16.0, use_dora=True),
    "DoRA, rsLoRA, some targets": LoraSettings(
        8, 16.0, target_modules="q_proj,up_proj,down_proj", use_rslora=True, use_dora=True
    ),
    "LoRA and embedding": LoraSettings(8, 16.0, modules_to_save=("embed_tokens",)),
    "LoRA and head": LoraSettings(8, 16.0, modules_to_save=("lm_head",)),
    "LoRA, embedding and head": LoraSettings(8, 16.0, modules_to_save=("embed_tokens", "lm_head")),
    "LoRA, embedding and head, tied": LoraSettings(8, 16.0, modules_to_save=("embed_tokens",)),
    "LoRA on experts (Qwen3-MoE)": LoraSettings(8, 16.0, target_parameters=("experts",)),
    "LoRA on experts (Mixtral)": LoraSettings(3, 16.0, target_parameters=("experts",)),
    "rsLoRA on down projections of some experts (Mixtral), rank and alpha of their own": LoraSettings(
        8,
        16.0,
        use_rslora=True,
        layers=(0, 2),
        target_parameters=("mlp.experts.down_proj",),
        rank_pattern=(("experts.down_proj", 4),),
        alpha_pattern=((".*experts.*", 24.0),),
    ),
    "LoRA on gates of experts (Qwen3-MoE), embedding and head": LoraSettings(
        8, 16.0, target_parameters=("mlp.experts.gate_up_proj",), modules_to_save=("embed_tokens", "lm_head")
    ),
}

FAMILIES = {
    "LoRA, embedding and head, tied": "llama3",
    "LoRA on experts (Qwen3-MoE)": "qwen3_moe",
    "LoRA on experts (Mixtral)": "mixtral",
    "rsLoRA on down projections of some experts (Mixtral), rank and alpha of their own": "mixtral",
    "LoRA on gates of experts (Qwen3-MoE), embedding and head": "qwen3_moe",
}
"""The tiny model of those kinds that are not measured on a Llama with an embedding and a head of its own."""


@dataclass(frozen=True)
class Differences:
    """Largest differences from PEFT, each divided by the largest magnitude.

    Attributes:
        exported: of the logits that PEFT computes from the adapter we save.
        imported: of the logits that we compute from the adapter PEFT saves.
        update: of the logits with and without adapter, which must be large for the others to say anything.
    """

    loss: float
    gradients: float
    exported: float
    imported: float
    update: float


def measure(folder: Path, lora: LoraSettings, ranks: Ranks, work: Path) -> Differences:
    """Compare one kind of LoRA on the checkpoint of a folder; `work` receives adapters."""
    pair = reference.load_pair(folder, ranks, lora=lora)
    ids = random_ids(2, TOKENS, COMMON["vocab_size"])
    batch = whole_rows(ids)
    found, expected = reference.our_gradients(pair.ours, ranks, batch), reference.reference_gradients(pair.peft, ids)
    logits = reference.logits(pair.ours, ranks, batch)
    exported = _export(pair, lora, ranks, work / "ours")
    with torch.no_grad():
        of_export = exported(input_ids=ids).logits
        with exported.disable_adapter():
            of_base = exported(input_ids=ids).logits
    pair.peft.save_pretrained(work / "pefts")
    of_import = reference.logits(_import(folder, work / "pefts", ranks), ranks, batch)
    return Differences(
        abs(found.loss - expected.loss) / expected.loss,
        reference.max_gradient_difference(found, expected),
        reference.relative_difference(logits, of_export),
        reference.relative_difference(of_import, logits),
        reference.relative_difference(of_base, of_export),
    )


def _export(pair: Pair, lora: LoraSettings, ranks: Ranks, folder: Path) -> PeftModel:
    save_adapter(pair.ours.root, lora, str(pair.folder), folder, ranks)
    base = reference.load_base(pair.folder, NF4, torch.float32)
    return PeftModel.from_pretrained(base, folder).train()  # train mode: see reference.load_pair


def _import(base: Path, folder: Path, ranks: Ranks) -> BuiltModel:
    adapter = open_adapter(folder, str(base))
    return build_model(base, ranks, NF4, adapter.lora, torch.float32, adapter=adapter.matrices)
