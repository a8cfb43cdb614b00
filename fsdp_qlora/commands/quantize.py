"""Make a pre-quantised bitsandbytes checkpoint of a model, in the memory of a few runs of weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

from fsdp_qlora.config import QuantizeConfig
from fsdp_qlora.distributed import pick_device
from fsdp_qlora.export.standalone import (
    Target,
    check_folders,
    check_output,
    copy,
    in_file_order,
    open_unquantized,
    quantized,
    quantized_config,
    side_files,
    write_checkpoint,
)
from fsdp_qlora.models.hub import resolve
from fsdp_qlora.quant.adapt import QuantSettings, block_experts
from fsdp_qlora.weights.writer import Written


def run(config: QuantizeConfig) -> None:
    """Quantise as `config` says; the command line's `quantize`."""
    started = time.monotonic()
    written = quantize(config)
    print(
        f"done: {written.size_bytes / 1e9:.2f} GB in {written.made + written.kept} files ({written.kept} of them from an"
        f" earlier run), {time.monotonic() - started:.0f} s\n"
        f"checkpoint: {config.output_dir}",
        flush=True,
    )


def quantize(config: QuantizeConfig) -> Written:
    """Write the checkpoint.

    Raises:
        ConfigError: the output folder holds something else.
        ModelError, WeightsError: the model cannot be found or read, or is quantised already.
        CheckpointError: the output cannot be written.
    """
    device = pick_device(config.device)
    check_output(config.output_dir, config.overwrite, Path(config.model).expanduser())
    folder = resolve(config.model, config.revision)
    output = check_folders(config.output_dir, folder)
    quant = QuantSettings(config.quant_type, config.double_quant)
    with open_unquantized(folder, quant) as source:
        if block_experts(source.skeleton):
            print(
                "quantize: experts are quantised matrix by matrix, which fsdp-qlora reads; transformers 5 does not",
                flush=True,
            )
        matrices = {source.checkpoint_name(name): name for name in source.linears}
        parts = [
            quantized(source, entry, matrices[entry.name], quant, device)
            if entry.name in matrices
            else copy(source, entry)
            for entry in in_file_order(source.raw.tensors)
        ]
        base_config = json.loads((folder / "config.json").read_text())
        identity = {
            "command": "quantize",
            "source": source.identity(),
            "quant_type": config.quant_type,
            "double_quant": config.double_quant,
            "max_shard_size": config.max_shard_size,
        }
        return write_checkpoint(
            Target(output, identity, config.max_shard_size, config.overwrite),
            parts,
            quantized_config(base_config, quant, source.family),
            side_files(folder),
            lambda line: print(f"quantize: {line}", flush=True),
        )
