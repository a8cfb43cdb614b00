"""Batches of random tokens, and the trainer that takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from fsdp_qlora import data
from fsdp_qlora.build import BuiltModel
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.trainer import Trainer


def random_ids(batch: int, tokens: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Return int64 [batch, tokens] without the special tokens 0 to 2."""
    return torch.randint(3, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def packed_batch(rows: list[list[Tensor]]) -> data.Batch:
    """Return a batch of rows of documents, every token but a document's first being a target. Rows are equally long."""
    documents = [document for row in rows for document in row]
    labels = [torch.cat([document[1:], torch.tensor([-100])]) for document in documents]
    shape = (len(rows), -1)
    lengths = [len(document) for document in documents]
    return data.Batch(
        input_ids=torch.cat(documents).view(shape),
        labels=torch.cat(labels).view(shape),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).view(shape),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        max_seqlen=max(lengths),
        num_targets=sum(lengths) - len(lengths),
    )


def whole_rows(ids: Tensor) -> data.Batch:
    """Return a batch of one document a row from ids [batch, tokens]."""
    return packed_batch([[row] for row in ids])


def random_examples(count: int, longest: int, vocab_size: int) -> list[data.Example]:
    """Return examples of different lengths; the first quarter of each is no target."""
    generator = torch.Generator().manual_seed(2)
    examples = []
    for _ in range(count):
        length = int(torch.randint(longest // 3, longest + 1, (), generator=generator))
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        examples.append(data.Example(ids, [-100] * (length // 4) + ids[length // 4 :]))
    return examples


def unpacked_loader(
    examples: list[data.Example], context_length: int, batch_size: int = 2, accumulation: int = 1
) -> data.Loader:
    """Return a loader of one example a row, padded, for a world of one."""
    return data.Loader(
        examples,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        context_length=context_length,
        packing=False,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        pad_token_id=0,
    )


def make_trainer(built: BuiltModel, ranks: Ranks, loader: data.Loader | None = None, **settings: object) -> Trainer:
    """Return fsdp_qlora's trainer around a model; without a loader it serves `loss` and `train_step` only."""
    config = TrainConfig(**{"max_steps": 1, "lr_scheduler": "constant", "warmup_ratio": 0.0, **settings})
    return Trainer(config, ranks, built, loader, {})
