"""What a model says about how its queries turn: guesses, which only its queries can prove."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_budgetkv.cache.probe.bank import Rotary
from vllm_budgetkv.cache.probe.rotation import Temperature, inverse_frequencies

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROPE_FIELDS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_dim",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "no_rope_layers",
)


@dataclass
class Candidates:
    """Rotations that the layers of a model may have, the likeliest first.

    Args:
        model: the model.
        text_config: its Hugging Face configuration, that of the language model.
    """

    model: torch.nn.Module
    text_config: Any
    _frequencies: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _shared: dict[tuple[Any, ...], Rotary] = field(default_factory=dict)

    def owners(self, layer_index: Mapping[str, int]) -> dict[int, torch.nn.Module]:
        """The module around each attention layer, which makes its queries."""
        return {
            layer_index[name]: module
            for module in self.model.modules()
            for child in module.children()
            if (name := getattr(child, "layer_name", "")) in layer_index
        }

    def of_layer(self, owner: torch.nn.Module, queries: torch.Tensor) -> Iterator[Rotary]:
        """Rotations that a layer may have; layers that share one get the same object.

        Args:
            owner: the module around the attention layer.
            queries: some of its queries, [..., D], for their size and device.
        """
        head_size = queries.shape[-1]
        nothing = queries.new_empty(0, dtype=torch.float32)
        for temperature, gain in itertools.product(
            (None, *self._temperatures()), (None, *_gains(owner, head_size))
        ):
            if temperature is not None and gain is None:
                yield self._rotary((), nothing, True, 0, None, temperature)
            for module in itertools.chain(owner.modules(), self.model.modules()):
                for number, inv_freq in enumerate(self._frequencies_of(module)):
                    start = head_size - 2 * len(inv_freq)
                    if start < 0:
                        continue
                    neox = bool(getattr(module, "is_neox_style", True))
                    for is_neox, first in itertools.product((neox, not neox), {0: 0, start: 0}):
                        key = (id(module), number)
                        yield self._rotary(key, inv_freq, is_neox, first, gain, temperature)

    def max_positions(self, owners: Mapping[int, torch.nn.Module]) -> int | None:
        """Positions that the tables beside the layers have room for; None without such tables."""
        tables = [t for owner in owners.values() for m in owner.modules() for t in _tables(m)]
        return min((len(table) for table in tables), default=None)

    def has_learned_positions(self, max_position: int) -> bool:
        """Whether positions enter by a learned embedding alone, so that no query is rotated."""
        if any(getattr(self.text_config, name, None) for name in ROPE_FIELDS):
            return False
        return any(
            ("position" in name or name.endswith("wpe"))
            and getattr(module, "num_embeddings", 0) > max_position
            for name, module in self.model.named_modules()
        )

    def _rotary(
        self,
        key: tuple[Any, ...],
        inv_freq: torch.Tensor,
        is_neox: bool,
        start: int,
        gain: torch.Tensor | None,
        temperature: Temperature | None,
    ) -> Rotary:
        if gain is not None:
            return Rotary(inv_freq, is_neox, start, gain, temperature)
        key = (*key, is_neox, start, temperature)
        if key not in self._shared:
            self._shared[key] = Rotary(inv_freq, is_neox, start, None, temperature)
        return self._shared[key]

    def _frequencies_of(self, module: torch.nn.Module) -> list[torch.Tensor]:
        if id(module) not in self._frequencies:
            self._frequencies[id(module)] = list(_frequencies(module))
        return self._frequencies[id(module)]

    def _temperatures(self) -> list[Temperature]:
        """Factors that Ministral 3, in either of its formats, and Llama 4 put on queries."""
        config = self.text_config
        rope = getattr(config, "rope_parameters", None) or {}
        native = getattr(config, "llama_4_scaling", None) or {}
        original = "original_max_position_embeddings"
        found = []
        if "beta" in native and original in native:
            found.append(Temperature(native["beta"], native[original]))
        if "llama_4_scaling_beta" in rope and original in rope:
            found.append(Temperature(rope["llama_4_scaling_beta"], rope[original]))
        if getattr(config, "attn_temperature_tuning", None):
            scale, period = getattr(config, "attn_scale", 0.1), getattr(config, "floor_scale", 8192)
            found.append(Temperature(scale, period, shift_tokens=1))
        return found


def _tables(module: torch.nn.Module) -> list[torch.Tensor]:
    """Tables of cosines and sines that the module turns by, [positions, rotary]."""
    table = getattr(module, "cos_sin_cache", None)
    joined = getattr(module, "long_short_cos_sin_cache", None)
    if joined is not None:
        # LongRoPE: vLLM takes one of the two for good when it starts
        original = module.original_max_position_embeddings
        table = joined[original:] if module.use_long_rope else joined[:original]
    if isinstance(table, torch.Tensor) and table.dim() == 2 and table.is_floating_point():
        return [table]
    return []


def _frequencies(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Inverse frequencies of the module's tables, or of the buffers that Transformers keeps."""
    for table in _tables(module):
        try:
            yield inverse_frequencies(table)
        except ValueError:
            # no table of one rotation: then it is no candidate, and others may fit
            continue
    for name, buffer in module.named_buffers(recurse=False):
        if name.endswith("inv_freq") and buffer.dim() == 1:
            yield buffer.float()


def _gains(owner: torch.nn.Module, head_size: int) -> list[torch.Tensor]:
    """Weights of the norms over one head beside the layer; one may stand behind the rotation."""
    weights = [getattr(module, "weight", None) for module in owner.children()]
    return [w.float() for w in weights if w is not None and w.shape == (head_size,)]
