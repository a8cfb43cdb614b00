"""Data: rows -> messages -> tokens and labels -> packed sequences -> batches of each rank."""

from fsdp_qlora.data.loader import Batch, Loader, make_loader
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.splits import check_vocabulary, load_splits
from fsdp_qlora.data.tokenize import Example

__all__ = ["Batch", "DataReport", "Example", "Loader", "check_vocabulary", "load_splits", "make_loader"]
