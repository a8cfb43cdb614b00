"""Slow things say how far they are, and quick ones nothing."""

from __future__ import annotations

import pytest

from fsdp_qlora import announce
from fsdp_qlora.announce import announced


def test_a_line_after_every_interval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 6.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(announce.time, "monotonic", lambda: next(clock))
    assert list(announced("abcd", lambda done: f"read: {done}")) == list("abcd")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "read: 1, 11 s so far\nread: 3, 22 s so far\n"


def test_only_where_it_is_to_be_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(announce, "INTERVAL_S", 0.0)
    assert list(announced("ab", lambda done: f"read: {done}", shown=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
