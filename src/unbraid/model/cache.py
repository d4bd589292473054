"""A key-value cache whose room is allocated once: a growing cache copies itself at every decoded token."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """One layer's keys and values, (B, heads, capacity, head size), of which a growing part is in use."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, head size) keys and values; returns views of all that are in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all_keys = self._room_for(key_states)
            self._all_values = self._room_for(value_states)
        end = self.length + key_states.shape[2]
        self._all_keys[:, :, self.length : end] = key_states
        self._all_values[:, :, self.length : end] = value_states
        self.length = end
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._all_keys = self._all_keys[indices]
        self._all_values = self._all_values[indices]
        self._show()

    def _room_for(self, states: Tensor) -> Tensor:
        batch, heads, _, size = states.shape
        return states.new_empty(batch, heads, self.capacity, size)

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys = self._all_keys[:, :, : self.length]
        self.values = self._all_values[:, :, : self.length]
        return self.keys, self.values


def reserved_cache(config: Any, capacity: int) -> DynamicCache:
    """An empty cache for `capacity` tokens a row; layers of other kinds (sliding windows) stay as is."""
    cache = DynamicCache(config=config)
    layers = cast("list[Any]", cache.layers)
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[i] = ReservedLayer(capacity)
    return cache
