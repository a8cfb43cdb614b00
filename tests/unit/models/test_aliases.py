"""The table of short model names."""

from __future__ import annotations

import re

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.models.aliases import ALIASES


def test_default_model_needs_no_hub() -> None:
    assert ALIASES[TrainConfig().model].repo is None


def test_repositories_are_hub_ids_and_differ() -> None:
    repos = [alias.repo for alias in ALIASES.values() if alias.repo is not None]
    assert len(set(repos)) == len(repos)
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+", repo) for repo in repos)


def test_names_tell_ready_made_4_bit_checkpoints() -> None:
    for name, alias in ALIASES.items():
        assert name == name.lower()
        assert name.endswith("-4bit") == (alias.bits == 4)
        assert (alias.repo or "").endswith("-bnb-4bit") == (alias.bits == 4)
        assert name.removesuffix("-4bit") in ALIASES


def test_only_the_vendors_own_repositories_are_gated() -> None:
    gated = {alias.repo.split("/")[0] for alias in ALIASES.values() if alias.gated and alias.repo}
    assert gated == {"meta-llama", "google", "CohereLabs"}
