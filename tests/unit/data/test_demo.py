"""The demo questions."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from fsdp_qlora.data.demo import demo_rows
from fsdp_qlora.errors import DataError


def pairs(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]


def test_questions_are_deterministic_different_and_right() -> None:
    pytest.importorskip("reasoning_gym")
    rows = pairs(demo_rows("train", 300, seed=3))
    assert rows == pairs(demo_rows("train", 300, seed=3))
    assert rows != pairs(demo_rows("train", 300, seed=4))
    assert len({question for question, _ in rows}) == 300
    sums = [(re.search(r": ([\d +-]+) =$", question), answer) for question, answer in rows]
    checked = [eval(match[1]) == int(answer) for match, answer in sums if match]
    assert len(checked) > 50
    assert all(checked)
    assert all(len(answer) < 8 for _, answer in rows)


def test_no_seed_brings_test_questions_into_training() -> None:
    pytest.importorskip("reasoning_gym")
    test = {question for question, _ in pairs(demo_rows("test", 100, seed=1))}
    assert len(test) == 100
    for seed in (1, 2):
        assert not test & {question for question, _ in pairs(demo_rows("train", 500, seed))}


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"pip install reasoning-gym==0\.1\.25"):
        demo_rows("train", 1, seed=0)
