"""The 'demo' dataset: arithmetic questions with checkable answers, made by reasoning-gym."""

from __future__ import annotations

import itertools
import random
import zlib
from typing import Literal

from fsdp_qlora.errors import DataError

GENERATORS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 2, "max_value": 60},
}
"""Settings of reasoning-gym's generators, easy enough that a model of 135M parameters learns in a few dozen steps."""

INSTALL = "pip install reasoning-gym==0.1.25"

TEST_SHARE = 8
"""One question in so many belongs to the test split, by its checksum: no seed brings a test question into training."""

MAX_INDEX = 2**31


def demo_rows(split: Literal["train", "test"], n: int, seed: int) -> list[dict[str, object]]:
    """Return n different question/answer rows of the 'messages' form; the same arguments give the same rows.

    The generators take turns, except that one whose questions are used up (there are 100 products) gives way.

    Raises:
        DataError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise DataError(f"the demo dataset needs reasoning-gym ({error}); run: {INSTALL}") from error
    # A question is drawn with seed + index: seeds this far apart give other questions.
    first = 1_000_003 * seed
    generators = [
        reasoning_gym.create_dataset(name, seed=first, size=MAX_INDEX, **settings)
        for name, settings in GENERATORS.items()
    ]
    answers: dict[str, str] = {}
    for index, generator in ((index, generator) for index in itertools.count() for generator in generators):
        if len(answers) >= n:
            break
        entry = generator[index]
        is_test = zlib.crc32(entry["question"].encode()) % TEST_SHARE == 0
        if is_test == (split == "test"):
            answers.setdefault(entry["question"], entry["answer"])
    pairs = list(answers.items())
    random.Random(first).shuffle(pairs)
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
