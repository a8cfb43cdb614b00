"""Answer a prompt with a trained adapter on its base, or with a model alone, in one process."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fsdp_qlora.adapters import open_adapter
from fsdp_qlora.build import build_model, form_alone, load_tokenizer, tokenizer_folder
from fsdp_qlora.config import GenerateConfig
from fsdp_qlora.data.prompts import encode_prompts
from fsdp_qlora.decode import read_stop_ids
from fsdp_qlora.distributed import compute_dtype, process_group
from fsdp_qlora.models.hub import resolve
from fsdp_qlora.models.skeleton import read_config


def run(config: GenerateConfig) -> None:
    """Print the answer; the command line's `generate`."""
    print(answer(config))


def generation_attention(base_folder: Path) -> str:
    """Return transformers' name of the attention to generate with: torch's own has no soft cap (Gemma 2)."""
    model_config, _ = read_config(base_folder)
    return "sdpa" if getattr(model_config, "attn_logit_softcapping", None) is None else "eager"


def answer(config: GenerateConfig) -> str:
    """Return the model's answer to the prompt.

    Raises:
        ConfigError: --device names a GPU that is not there.
        CheckpointError: the adapter is missing, damaged, of another kind, or belongs to another base.
        ModelError, WeightsError: the base cannot be found or read.
    """
    with process_group("full", timeout_s=600, device=config.device) as ranks:
        adapter = None
        if config.adapter is not None:
            adapter = open_adapter(Path(config.adapter), config.model, config.revision)
        base_folder = (
            resolve(adapter.base, adapter.revision) if adapter else resolve(config.model or "", config.revision)
        )
        built = build_model(
            base_folder,
            ranks,
            adapter.quant if adapter else form_alone(base_folder),
            adapter.lora if adapter else None,
            compute_dtype(config.precision, ranks.device),
            adapter=adapter.matrices if adapter else None,
            shard=False,
            attention=generation_attention(base_folder),
        )
        tokenizer = load_tokenizer(tokenizer_folder(adapter, base_folder))
        torch.manual_seed(config.seed)
        return _generate(built.skeleton.model.eval(), tokenizer, config, base_folder)


@torch.no_grad()
def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig, base_folder: Path
) -> str:
    prompt = torch.tensor(encode_prompts([config.prompt], tokenizer), device=next(model.parameters()).device)
    sampling = (
        {"do_sample": True, "temperature": config.temperature} if config.temperature > 0 else {"do_sample": False}
    )
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            use_cache=True,
            eos_token_id=sorted(read_stop_ids(base_folder, tokenizer)) or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        ),
    )
    answer: str = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    return answer.strip()
