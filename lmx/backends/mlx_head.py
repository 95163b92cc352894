"""Logits of the tokens that are asked for. mlx-lm's models make them of every token they read, and
with a large vocabulary that is a good part of what a short prompt costs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from .mlx_cache import Cache


class Head:
    """Has a model's body hand on only some of its hidden states to the layer that makes logits."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self._last: tuple[mx.array, mx.array] | None = None
        """Rows and places of the hidden states to hand on; None: all."""
        self.selects = self._hook()
        """Logits of the last tokens take no others; if not, they are picked out of all."""

    def _hook(self) -> bool:
        body = _body(self._network)
        if body is None:
            return False
        plain = type(body)

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = plain.__call__(this, *args, **kwargs)
            return hidden if self._last is None else hidden[self._last][:, None]

        # Python looks `__call__` up in the class, and everything else must stay where it is.
        body.__class__ = type(plain.__name__, (plain,), {"__call__": call})
        # What a body that returns something else than hidden states makes of it.
        with suppress(TypeError, ValueError, IndexError, AttributeError):
            # The shape is known without computing anything.
            tokens = mx.zeros((1, 2), dtype=mx.uint32)
            rows, places, _ = self._logits(tokens, make_prompt_cache(self._network), [1]).shape
            if (rows, places) == (1, 1):
                return True
        body.__class__ = plain
        return False

    def _logits(self, tokens: mx.array, cache: Cache, last: list[int]) -> mx.array:
        self._last = mx.arange(len(last)), mx.array(last)
        try:
            logits: mx.array = self._network(tokens, cache=cache)
        finally:
            self._last = None
        return logits

    def __call__(self, tokens: mx.array, cache: Cache, last: list[int]) -> mx.array:
        """What follows the `last` place of each row of tokens [rows, tokens]: logits [rows,
        vocabulary], lazy."""
        if self.selects:
            return self._logits(tokens, cache, last)[:, 0]
        logits: mx.array = self._network(tokens, cache=cache)
        return logits[mx.arange(len(last)), mx.array(last)]


def _body(network: Any) -> nn.Module | None:
    """The part that makes hidden states, under the names that mlx-lm's models give it."""
    while isinstance(inner := getattr(network, "language_model", None), nn.Module):
        network = inner
    for name in ("model", "transformer", "backbone"):
        if isinstance(body := getattr(network, name, None), nn.Module):
            return body
    return None
