"""Short training runs whose losses are kept in losses.json, so that no change alters the mathematics unnoticed.

After a change that is meant to alter them: python -m tests.golden.golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora import data
from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, process_group
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from fsdp_qlora.trainer import StepResult, Trainer
from tests.tiny import COMMON, save_tiny

FILE = Path(__file__).with_name("losses.json")
NUM_STEPS, CONTEXT_LENGTH = 8, 64

RUNS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_unpacked_linear_decay": {"packing": False, "lr_scheduler": "linear", "weight_decay": 0.1},
    "gemma2_two_targets": {
        "family": "gemma2",
        "double_quant": False,
        "lora_target_modules": "q_proj,down_proj",
    },
}
"""Settings of each run beyond those of `train`; family is the tiny model."""


def examples() -> list[data.Example]:
    """Return 24 examples of 8 to 48 random tokens; the first quarter of each is no target."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for _ in range(24):
        length = int(torch.randint(8, 49, (), generator=generator))
        ids = torch.randint(3, COMMON["vocab_size"], (length,), generator=generator).tolist()
        made.append(data.Example(ids, [-100] * (length // 4) + ids[length // 4 :]))
    return made


def train(
    folder: Path, ranks: Ranks, num_steps: int = NUM_STEPS, **settings: Any
) -> tuple[list[StepResult], BuiltModel]:
    """Train a tiny model for some steps of two micro-batches and return the steps' results."""
    family = settings.pop("family", "llama")
    config = TrainConfig(
        **{"lora_rank": 8, "lr": 5e-3, "max_steps": NUM_STEPS, "warmup_ratio": 0.25, "seed": 7, **settings}
    )
    torch.manual_seed(config.seed)
    lora = LoraSettings(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
    built = build_model(
        save_tiny(family, folder),
        ranks,
        QuantSettings(config.base_form, config.double_quant, config.quant_storage, ranks.num_shards),
        lora,
        torch.float32,
        memory=MemorySettings(checkpoint_blocks=COMMON["num_hidden_layers"]),
        seed=config.seed,
    )
    loader = data.Loader(
        examples(),
        batch_size=2,
        gradient_accumulation_steps=2,
        context_length=CONTEXT_LENGTH,
        packing=config.packing,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        shuffle=True,
        pad_token_id=0,
    )
    trainer = Trainer(config, ranks, built, loader, {})
    torch.manual_seed(config.seed)
    results: list[StepResult] = []
    epoch = index = 0
    for step in range(num_steps):
        if index == loader.num_steps(epoch):
            epoch, index = epoch + 1, 0
        results.append(trainer.train_step(loader.step(epoch, index), step))
        index += 1
    return results, built


def main() -> None:
    """Write losses.json."""
    found = {}
    with process_group("full", timeout_s=60, device="cpu") as ranks, tempfile.TemporaryDirectory() as folder:
        for name, settings in RUNS.items():
            results, _ = train(Path(folder) / name, ranks, **settings)
            found[name] = {
                "loss": [result.loss for result in results],
                "grad_norm": [result.grad_norm for result in results],
            }
    FILE.write_text(json.dumps({"torch": torch.__version__, "runs": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
