"""Caches of a reduced prompt: which number they answer to whom, and what becomes of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from tokred.adapters.logical_cache import Reduced, arm, physical_length, reduced_state, set_reduced
from tokred.core.errors import StaleCacheError

CONFIG = LlamaConfig(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=8, intermediate_size=8
)
FULL, LEFT, BATCH = 10, 6, 3


def filled(length: int = LEFT, kind: str = "dynamic") -> DynamicCache | StaticCache:
    cache = DynamicCache(config=CONFIG) if kind == "dynamic" else StaticCache(config=CONFIG, max_cache_len=20)
    extend(cache, length)
    return cache


def extend(cache, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    for layer in range(2):
        keys = torch.randn(BATCH, 2, length, 4, generator=generator)
        cache.update(keys, keys.clone(), layer)


def state(shift: bool = True) -> Reduced:
    mask = torch.ones(BATCH, LEFT, dtype=torch.bool)
    mask[1, :2] = False
    moved = torch.tensor([[4], [6], [4]]) if shift else None
    types = torch.arange(BATCH * LEFT).reshape(BATCH, LEFT)
    return Reduced(mask=mask, full=FULL, shift=moved, whole=False, types=types)


def reduced(kind: str = "dynamic"):
    cache = filled(kind=kind)
    set_reduced(cache, state())
    return cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_lengths(kind):
    cache = reduced(kind)
    assert int(cache.get_seq_length()) == FULL
    assert int(physical_length(cache)) == LEFT
    extend(cache, 2)
    assert int(cache.get_seq_length()) == FULL + 2
    assert int(physical_length(cache)) == LEFT + 2
    with pytest.raises(StaleCacheError, match="not patched"):
        cache.get_query_offset()
    arm(cache)
    assert int(cache.get_query_offset()) == LEFT + 2


def test_plain_caches_are_no_reduced_ones():
    assert reduced_state(filled()) is None
    assert reduced_state(None) is None
    assert physical_length(None) == 0
    assert physical_length(filled()) == LEFT


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset_forgets(kind):
    cache = reduced(kind)
    cache.reset()
    assert reduced_state(cache) is None
    assert int(cache.get_seq_length()) == 0
    extend(cache, 3)
    assert int(cache.get_seq_length()) == int(cache.get_query_offset()) == 3


def test_the_class_hides_itself():
    cache = reduced()
    assert type(cache).__name__ == "DynamicCache"
    assert type(cache).__module__ == DynamicCache.__module__
    assert isinstance(cache, DynamicCache)
    first = type(cache)
    set_reduced(cache, state())  # twice is once
    assert type(cache) is first


def test_rows_move_together():
    rows = torch.tensor([2, 1, 1])
    for name, given, picked in [
        ("reorder_cache", rows, rows),
        ("batch_select_indices", rows, rows),
        ("batch_repeat_interleave", 2, torch.tensor([0, 0, 1, 1, 2, 2])),
    ]:
        cache, old, keys = reduced(), state(), filled().layers[0].keys
        getattr(cache, name)(given)
        new = reduced_state(cache)
        assert torch.equal(new.mask, old.mask[picked])
        assert torch.equal(new.shift, old.shift[picked])
        assert torch.equal(new.types, old.types[picked])
        assert torch.equal(cache.layers[0].keys, keys[picked])


def test_crop_behind_the_prompt_and_not_into_it():
    cache = reduced()
    extend(cache, 3)
    cache.crop(-2)
    assert cache.get_seq_length() == FULL + 1
    assert cache.layers[0].keys.shape[2] == LEFT + 1
    with pytest.raises(StaleCacheError, match="cut into the reduced prompt"):
        cache.crop(-2)
    assert cache.layers[0].keys.shape[2] == LEFT + 1
    cache.crop(-1)
    cache.crop(0)
    assert cache.get_seq_length() == FULL
    extend(cache, 3)
    cache.crop(FULL + 1)  # what older releases mean by a positive number
    assert cache.get_seq_length() == FULL + 1
    cache.crop(-LEFT - 1)
    assert reduced_state(cache) is None
    assert cache.get_seq_length() == 0


def test_copies_and_pickles():
    cache = reduced()
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(copied) is type(cache)
        assert copied.get_seq_length() == FULL
        copied.reorder_cache(torch.tensor([1, 1, 1]))
        assert torch.equal(reduced_state(cache).mask, state().mask)
        assert torch.equal(reduced_state(copied).mask, state().mask[[1, 1, 1]])


def test_masks_and_types_are_translated():
    held = state()
    mask = torch.ones(BATCH, FULL + 2, dtype=torch.long)
    mask[0, -1] = 0
    got = held.translate(mask, FULL + 2)
    assert got.shape == (BATCH, LEFT + 2)
    assert torch.equal(got[:, :LEFT].bool(), held.mask)
    assert torch.equal(got[:, LEFT:], mask[:, FULL:])
    assert torch.equal(held.translate(None, FULL + 2)[:, :LEFT].bool(), held.mask)
    whole = Reduced(torch.ones(1, LEFT, dtype=torch.bool), FULL, None, whole=True)
    assert whole.translate(None, FULL + 2) is None
    types = torch.full((BATCH, FULL + 2), 100)
    assert torch.equal(held.translate_types(types, FULL + 2)[:, :LEFT], held.types)
    new = types[:, :2]
    assert held.translate_types(new, FULL + 2) is new
    assert held.translate_types(None, FULL + 2) is None


def test_more_tokens_than_there_were():
    cache = filled()
    set_reduced(cache, Reduced(torch.ones(BATCH, LEFT, dtype=torch.bool), full=4, shift=None, whole=True))
    assert cache.get_seq_length() == 4
    assert physical_length(cache) == LEFT
