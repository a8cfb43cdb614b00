"""Fine-tune language models larger than one GPU: 4-bit base sharded by FSDP2, LoRA adapters trained."""

import logging

__version__ = "0.1.0"

# On some CPUs it warns, at every start, that a kernel for inference is not installed, which nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
