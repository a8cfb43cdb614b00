"""Fine-tune language models larger than one GPU: 4-bit base sharded by FSDP2, LoRA adapters trained."""

__version__ = "0.1.0"
