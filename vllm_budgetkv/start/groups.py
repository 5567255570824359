"""Which layers of a model share the pool: those under the quota, and those of other kinds.

vLLM sorts layers into groups, each of one kind and of as many layers as the others, and gives a
request blocks for every group from one pool. Where a block holds keys and values of our layers, it
holds nothing else; where it holds the state of a group of recurrent layers, it is as long, though
the state does not grow. So that both fill it, vLLM makes a block of attention as many tokens long
as the state of a layer takes bytes.

Layers with windows are grouped by the bytes of a block: one of ours is of all of our layers, and as
many of theirs share a block as fit it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_budgetkv.arithmetic.layout import SUPPORTED_PAGE_TOKENS, PageLayout
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.start import refused_models

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_budgetkv.start.engine_config import EngineConfig

# tokens of a head-page where the engine's block is longer than one
PAGE_TOKENS = 16
# vLLM pads the smaller of two kinds of layers rather than split the larger, up to this ratio
PADS_UP_TO = 1.5
# blocks of a request in a group of recurrent layers, by `--mamba-cache-mode`; there are no others
STATE_BLOCKS = {"none": 1, "align": 2}


@dataclass(frozen=True)
class Groups:
    """How many layers of each kind there are, and how vLLM groups them.

    Args:
        num_layers: with keys and values, so under the quota (L).
        num_recurrent: with recurrent state.
        num_windowed: with windows or chunks.
        state_blocks: that a request holds at once in one group of recurrent layers.
    """

    num_layers: int
    num_recurrent: int = 0
    num_windowed: int = 0
    state_blocks: int = 0

    @property
    def block_layers(self) -> int:
        """Layers of a group: a block is a piece of the cache of so many."""
        if not self.num_recurrent:
            return self.num_layers
        fewer, more = sorted((self.num_layers, self.num_recurrent))
        return more if more < fewer * PADS_UP_TO else fewer

    @property
    def is_split(self) -> bool:
        """Whether our layers are more than a group holds, so that no block is of all of them."""
        return self.num_layers > self.block_layers

    @property
    def blocks_beside(self) -> int:
        """Blocks of recurrent state that a request holds beside its quota."""
        return ceil_div(self.num_recurrent, self.block_layers) * self.state_blocks


def groups_of(engine: EngineConfig) -> Groups:
    """The groups of an engine's layers."""
    model, parallel = engine.model_config, engine.parallel_config
    num_layers = model.get_num_layers(parallel)
    if refused_models.keeps_windows(model):
        ours = refused_models.num_full_layers(model)
        # of the whole model, also where stages share its layers, which is refused
        return Groups(ours, num_windowed=model.get_total_num_hidden_layers() - ours)
    if not refused_models.keeps_state(model):
        return Groups(num_layers)
    return Groups(
        refused_models.num_full_layers(model),
        refused_models.num_state_layers(model),
        state_blocks=STATE_BLOCKS[engine.cache_config.mamba_cache_mode],
    )


def page_tokens_of(engine: EngineConfig) -> int:
    """Tokens of a head-page (N): of a block as the user asked for it, before it is made longer."""
    cache = engine.cache_config
    if not engine.model_config.is_hybrid:
        return cache.block_size
    is_asked = cache.user_specified_block_size and cache.block_size in SUPPORTED_PAGE_TOKENS
    return cache.block_size if is_asked else PAGE_TOKENS


def block_pages_of(vllm_config: VllmConfig, layout: PageLayout) -> int:
    """Head-pages of a head in a block (m): as many as the state of a recurrent layer is long.

    Args:
        vllm_config: of a model with recurrent layers.
        layout: of a head-page.
    """
    num_heads = vllm_config.model_config.get_num_kv_heads(vllm_config.parallel_config)
    pages = ceil_div(state_bytes(vllm_config), num_heads * layout.page_bytes)
    asked_tokens = vllm_config.cache_config.block_size
    if vllm_config.cache_config.user_specified_block_size:
        pages = max(pages, ceil_div(asked_tokens, layout.page_tokens))
    return pages


def lengthen_blocks(vllm_config: VllmConfig, block_tokens: int) -> None:
    """Let vLLM's blocks be so long, as it would make them once it knows the layers. Mutates."""
    cache = vllm_config.cache_config
    cache.block_size = block_tokens
    cache.user_specified_block_size = True
    if cache.mamba_cache_mode == "align":
        cache.mamba_block_size = block_tokens


def state_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of the state of one recurrent layer on one worker, as vLLM counts them."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.kv_cache_interface import MambaSpec

    model = vllm_config.model_config
    kind, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    spec = MambaSpec(
        shapes=kind.get_mamba_state_shape_from_config(vllm_config),
        dtypes=kind.get_mamba_state_dtype_from_config(vllm_config),
        block_size=-1,
    )
    return spec.page_size_bytes
