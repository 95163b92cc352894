"""Where another prompt will probably part from this one. No engine, no I/O."""

from __future__ import annotations

from typing import Final

LEAST_TOKENS: Final = 16
"""Of a prefix worth keeping."""


def borders(tokens: list[int], control: frozenset[int]) -> list[int]:
    """Lengths of prefixes that end with a message: the system prompt, all but the last message, and
    all messages, as far as the tokens tell: the prompt's last control token is taken for what
    begins a message, or ends one."""
    last = next((token for token in reversed(tokens) if token in control), None)
    places = [i for i, token in enumerate(tokens) if token == last]
    chosen = {places[nth] for nth in (1, -2, -1) if -len(places) <= nth < len(places)}
    return sorted(place for place in chosen if place >= LEAST_TOKENS)
