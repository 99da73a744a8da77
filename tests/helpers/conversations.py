"""Conversations as lists of messages."""

from __future__ import annotations


def chat(*turns: str) -> list[dict[str, str]]:
    """Messages from texts, user and assistant in turn, the last one the assistant's."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
