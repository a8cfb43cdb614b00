"""Data: rows -> messages -> tokens and labels -> packed sequences -> batches of each rank."""

from fsdp_qlora.data.cache import load_store
from fsdp_qlora.data.loader import Batch, Loader, make_loader
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.splits import check_vocabulary, load_splits
from fsdp_qlora.data.store import Mixture, TokenStore
from fsdp_qlora.data.tokenize import Example

__all__ = [
    "Batch",
    "DataReport",
    "Example",
    "Loader",
    "Mixture",
    "TokenStore",
    "check_vocabulary",
    "load_splits",
    "load_store",
    "make_loader",
]
