"""Secrets are masked, other texts stay."""

from __future__ import annotations

import pytest

from fsdp_qlora.redact import redact


def test_values_of_secret_variables_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_PASSWORD", "0123456789abcdef-and-more")
    monkeypatch.setenv("KEYBOARD_KEY", "qwerty")
    text = "a 0123456789abcdef-and-more b 0123456789abcdef c qwerty"
    assert redact(text) == "a [secret] b [secret] c qwerty", "the longest first; short values are words"


def test_hub_tokens_are_masked_wherever_they_come_from() -> None:
    assert redact("https://x:hf_abcdefghijklmnopqrstuvwxyz@hub") == "https://x:[secret]@hub"
    assert redact("hf_hub and hf_transfer") == "hf_hub and hf_transfer"
