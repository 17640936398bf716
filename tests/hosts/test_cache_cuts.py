"""Taking entries out of KV caches, layer by layer, and what they say about themselves afterwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from tokred.adapters.cache_cuts import cut_layer, held_entries, zero_entries
from tokred.adapters.logical_cache import (
    Layered,
    Reduced,
    arm,
    disarm,
    layer_states,
    physical_length,
    set_layers,
)
from tokred.core.errors import StaleCacheError, UnsupportedGenerationError

SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 8,
    "intermediate_size": 8,
}
CONFIGS = {"plain": LlamaConfig(**SIZES), "window": MistralConfig(**SIZES, sliding_window=8)}
FULL, BATCH = 6, 3
INDEX = torch.tensor([[0, 2, 5], [1, 2, 5], [3, 4, 5]])
kinds = pytest.mark.parametrize("kind", ["dynamic", "static"])
configs = pytest.mark.parametrize("config", CONFIGS)


def values(length: int, layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * length + layer)
    return torch.randn(BATCH, 2, length, 4, generator=generator)


def filled(kind: str = "dynamic", config: str = "plain", length: int = FULL):
    cache = DynamicCache(config=CONFIGS[config])
    if kind == "static":
        cache = StaticCache(config=CONFIGS[config], max_cache_len=20)
    for layer in range(3):
        cache.update(values(length, layer), -values(length, layer), layer)
    return cache


def reduced(kind: str = "dynamic"):
    """Layer 1 was cut; row 1 has padding there."""
    cache = filled(kind)
    cut_layer(cache.layers[1], INDEX, 1)
    mask = torch.tensor([[True] * 3, [False, True, True], [True] * 3])
    state = Reduced(mask=mask, full=FULL, shift=torch.tensor([[3], [4], [3]]), whole=False)
    set_layers(cache, Layered(FULL, BATCH, (None, state, None)))
    return cache


@configs
@kinds
def test_cut_keeps_the_entries_named_and_takes_new_ones_behind_them(kind, config):
    cache = filled(kind, config)
    layer, before = cache.layers[1], values(FULL, 1)
    cut_layer(layer, INDEX, 1)
    assert int(layer.get_seq_length()) == 3
    for row, places in enumerate(INDEX):
        assert torch.equal(layer.keys[row, :, :3], before[row][:, places])
        assert torch.equal(layer.values[row, :, :3], -before[row][:, places])
    if kind == "static":
        assert not layer.keys[:, :, 3:].any()
    more = values(2, 7)
    keys, _ = cache.update(more, -more, 1)
    assert torch.equal(keys[:, :, 3:5], more)
    assert int(layer.get_seq_length()) == 5
    assert int(cache.layers[0].get_seq_length()) == FULL


@configs
@kinds
def test_zeroed_entries_stay(kind, config):
    cache = filled(kind, config)
    where = torch.zeros(BATCH, FULL, dtype=torch.bool)
    where[0, 1] = where[2, 4] = True
    zero_entries(cache.layers[2], where, 2)
    wanted = values(FULL, 2).masked_fill(where[:, None, :, None], 0)
    assert torch.equal(cache.layers[2].keys[:, :, :FULL], wanted)
    assert torch.equal(cache.layers[2].values[:, :, :FULL], -wanted)
    assert int(cache.layers[2].get_seq_length()) == FULL


@kinds
@pytest.mark.parametrize("length", [7, 8, 11])
def test_a_window_that_dropped_entries_itself_is_cut_of_what_it_holds(kind, length):
    cache, before = filled(kind, "window", length), values(length, 1)
    layer = cache.layers[1]
    assert held_entries(layer, 1) == 7  # a new token sees itself and seven before it
    zero_entries(layer, torch.arange(length).expand(BATCH, -1) == length - 1, 1)
    cut_layer(layer, INDEX, 1)
    before[:, :, -1] = 0
    for row, places in enumerate(INDEX):
        assert torch.equal(layer.keys[row, :, :3], before[row, :, -7:][:, places])
    more = values(6, 7)
    keys, _ = cache.update(more[:, :, :2], more[:, :, :2], 1)
    assert torch.equal(keys[:, :, 3:5], more[:, :, :2])
    assert int(layer.get_seq_length()) == 5
    cache.update(more[:, :, 2:], more[:, :, 2:], 1)  # the window fills again, and the oldest go
    assert torch.equal(layer.keys[:, :, -6:], more)
    assert held_entries(layer, 1) == 7


def test_unknown_layers_are_refused_by_name():
    class Compressed(DynamicLayer):
        pass

    layer = Compressed()
    layer.update(values(FULL, 0), values(FULL, 0))
    with pytest.raises(UnsupportedGenerationError, match="cache of layer 4 is a Compressed"):
        cut_layer(layer, INDEX, 4)


@kinds
def test_lengths_are_those_of_the_prompt(kind):
    cache = reduced(kind)
    assert [int(cache.get_seq_length(layer)) for layer in range(3)] == [FULL] * 3
    assert int(physical_length(cache)) == FULL
    with pytest.raises(StaleCacheError, match="not patched"):
        cache.get_query_offset()
    arm(cache)
    assert [int(cache.get_query_offset(layer)) for layer in range(3)] == [FULL, 3, FULL]
    disarm(cache)
    for layer in range(3):
        cache.update(values(2, layer), values(2, layer), layer)
    assert [int(cache.get_seq_length(layer)) for layer in range(3)] == [FULL + 2] * 3
    assert int(physical_length(cache)) == FULL + 2


@kinds
def test_rows_move_with_the_cache(kind):
    cache = reduced(kind)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    state = layer_states(cache).states[1]
    assert state.mask[:, 0].tolist() == [False, False, True]
    assert state.shift[:, 0].tolist() == [4, 4, 3]
    assert torch.equal(cache.layers[1].keys[0, :, :3], values(FULL, 1)[1][:, INDEX[1]])


def test_rows_are_repeated_and_selected():
    cache = reduced()
    cache.batch_repeat_interleave(2)
    assert layer_states(cache).rows == 6
    assert layer_states(cache).states[1].shift[:, 0].tolist() == [3, 3, 4, 4, 3, 3]
    cache.batch_select_indices(torch.tensor([2, 5]))
    assert layer_states(cache).rows == 2
    assert layer_states(cache).states[1].shift[:, 0].tolist() == [4, 3]
    assert cache.layers[1].keys.shape[0] == 2


def test_crop_takes_what_came_after_the_prompt():
    cache = reduced()
    for layer in range(3):
        cache.update(values(4, layer), values(4, layer), layer)
    cache.crop(-3)
    assert [layer.keys.shape[2] for layer in cache.layers] == [FULL + 1, 4, FULL + 1]
    assert int(cache.get_seq_length()) == FULL + 1
    with pytest.raises(StaleCacheError, match="cut into the reduced prompt"):
        cache.crop(-2)
    cache.crop(FULL)
    assert [layer.keys.shape[2] for layer in cache.layers] == [FULL, 3, FULL]


@kinds
def test_reset_copies_and_pickles(kind):
    cache = reduced(kind)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(other).__name__ == type(cache).__name__
        assert int(other.get_seq_length(1)) == FULL
        assert torch.equal(other.layers[1].keys, cache.layers[1].keys)
        other.reset()
        assert layer_states(other) is None
        assert int(other.get_seq_length(1)) == 0
    assert layer_states(cache).states[1] is not None
