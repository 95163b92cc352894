"""Logits of a few places only, against those that the same model makes of all."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from lmx.backends.mlx_head import Head

from .families import BASE, FAMILIES, random_model

TOKENS = mx.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_logits_are_the_same(family: str) -> None:
    """One place of each row, in every family; whoever calls the model itself gets all as before."""
    network = random_model(BASE | FAMILIES[family] | {"model_type": family}, mx.float32)
    whole = network(TOKENS, cache=make_prompt_cache(network))
    head = Head(network)
    assert head.selects
    last = head(TOKENS, make_prompt_cache(network), [4, 2])
    assert mx.allclose(last, whole[mx.array([0, 1]), mx.array([4, 2])], rtol=1e-3, atol=1e-4)
    assert mx.allclose(network(TOKENS, cache=make_prompt_cache(network)), whole, atol=1e-5)


class _Tuple(nn.Module):  # type: ignore[misc]
    """A body that returns more than its hidden states."""

    def __call__(self, tokens: mx.array, cache: Any = None) -> tuple[mx.array, None]:
        return mx.repeat(tokens[..., None], 8, axis=2).astype(mx.float32), None


class _Model(nn.Module):  # type: ignore[misc]
    def __init__(self, body: nn.Module, name: str) -> None:
        super().__init__()
        setattr(self, name, body)
        self.name = name
        self.layers: list[nn.Module] = []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        hidden: mx.array = self[self.name](tokens, cache)[0]
        return hidden * 2


@pytest.mark.parametrize("name", ["model", "trunk"])
def test_another_kind_of_body_is_left_alone(name: str) -> None:
    """Its logits are made of every token, and those asked for picked out."""
    network = _Model(_Tuple(), name)
    head = Head(network)
    assert not head.selects and type(network[name]) is _Tuple
    assert head(TOKENS, [], [0, 3]).tolist() == [[10.0] * 8, [12.0] * 8]
