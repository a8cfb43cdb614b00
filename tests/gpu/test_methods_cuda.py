"""Every kind of LoRA on a GPU against the CPU, on which the parity tests compare it with PEFT: losses and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fsdp_qlora.adapters import gather_adapter
from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import process_group
from fsdp_qlora.optim import local
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.batches import make_trainer, random_ids, whole_rows
from tests.distributed.checkpoints import save_quantized
from tests.parity.methods import FAMILIES, METHODS, TOKENS
from tests.parity.reference import trained_by_pefts_names
from tests.ranks import run_ranks
from tests.tiny import COMMON, save_tiny

pytestmark = pytest.mark.gpu

BASES = {"llama", "unquantised", *FAMILIES.values()}
RUNS = {method: (FAMILIES.get(method, "llama"), lora) for method, lora in METHODS.items()}
RUNS |= {"LoRA, not quantised": ("unquantised", LoraSettings(8, 16.0))}
RUNS |= {"DoRA, not quantised": ("unquantised", LoraSettings(8, 16.0, use_dora=True))}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Quantised beforehand: both devices would do it themselves, with other bytes here and there."""
    folder = tmp_path_factory.mktemp("methods")
    found = {"unquantised": save_tiny("llama", folder / "unquantised")}
    for family in BASES - {"unquantised"}:
        source = save_tiny(family, folder / family)
        found[family] = save_quantized(source, folder / f"{family}-nf4", skip=".gate.weight")
    return found


def compute(bases: dict[str, Path], device: str) -> dict[str, tuple[list[float], dict[str, np.ndarray]]]:
    """Return by method the losses of two steps, and by PEFT's names the gradients of the second and what was trained."""
    results = {}
    with process_group("full", 60, device=device) as ranks:
        for method, (base, lora) in RUNS.items():
            quant = QuantSettings("none" if base == "unquantised" else "nf4")
            built = build_model(bases[base], ranks, quant, lora, torch.float32)
            trainer, found, losses = make_trainer(built, ranks, max_steps=2, lr=1e-3), {}, []
            trainer.optimizer.zero_grad = lambda *_: None  # to look at the gradients of a whole step
            for step in range(2):
                for _, parameter in trained_by_pefts_names(built):
                    parameter.grad = None
                batch = whole_rows(random_ids(2, TOKENS, COMMON["vocab_size"], seed=step))
                losses.append(trainer.train_step([batch], step).loss)
            for name, parameter in trained_by_pefts_names(built):
                assert parameter.grad is not None
                found[f"gradient of {name}"] = local(parameter.grad).cpu().numpy()
            found |= {name: value.numpy() for name, value in gather_adapter(built.root, ranks).items()}
            results[method] = losses, found
    return results


def test_methods_are_those_of_the_cpu(bases: dict[str, Path]) -> None:
    on_cpu, on_gpu = (run_ranks(compute, 1, bases, device, cuda=True)[0] for device in ("cpu", "cuda"))
    for method, (losses, expected) in on_cpu.items():
        found_losses, found = on_gpu[method]
        assert found.keys() == expected.keys()
        apart = {name: np.abs(found[name] - value).max() / np.abs(value).max() for name, value in expected.items()}
        gradients = max(value for name, value in apart.items() if name.startswith("gradient"))
        trained = max(value for name, value in apart.items() if not name.startswith("gradient"))
        print(f"{method}: losses {losses} {found_losses}, gradients {gradients:.1e}, trained {trained:.1e} apart")
        assert found_losses == pytest.approx(losses, rel=1e-5), method
        assert losses[0] != losses[1]
        assert gradients < 1e-3, method
        assert trained < 2e-2, f"{method}: AdamW's first steps follow the sign of gradients, also of tiny ones"
