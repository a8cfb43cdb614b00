"""Data: rows -> messages -> tokens and labels -> packed sequences -> batches of each rank."""

from fsdp_qlora.data.loader import Batch, Loader
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.splits import load_splits
from fsdp_qlora.data.tokenize import Example

__all__ = ["Batch", "DataReport", "Example", "Loader", "load_splits"]
