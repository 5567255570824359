"""Attention of others over the same tokens, where a library can be imported.

Whole-request peers attend as their library is meant to: one sequence per request with all its KV
heads, so they need heads of one length. Head-wise peers take each (request, KV head) as a sequence
of one KV head over `[P, N, 1, D]` views of our pool, as an engine could serve ragged heads.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.kernels.caches import Cache

    Run = Callable[[], torch.Tensor]
    Peer = Callable[["Batch"], Run]

# what a library raises where it is missing, or does not serve this device or these sizes
REFUSALS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)
WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True)
class Batch:
    """Queries of some requests, `row_tokens` each, over a cache that holds these tokens already.

    query: [R * t, Hq, D]. Every slot of the cache is a row, in order.
    """

    query: torch.Tensor
    cache: Cache
    row_tokens: int

    @property
    def rows(self) -> int:
        return self.cache.lens.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.cache.lens.shape[1]

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    @property
    def longest_tokens(self) -> int:
        return int(self.cache.lens.max())

    def starts(self, sequences: int) -> torch.Tensor:
        """int32 [sequences + 1]: where each sequence's queries start."""
        ends = torch.arange(sequences + 1, dtype=torch.int32, device=self.query.device)
        return ends * self.row_tokens

    def by_head(self) -> torch.Tensor:
        """[R * H * t, G, D]: the queries of each (request, KV head); a view for t = 1."""
        rows, heads, tokens = self.rows, self.kv_heads, self.row_tokens
        split = self.query.view(rows, tokens, heads, -1, self.query.shape[-1])
        return split.transpose(1, 2).reshape(rows * heads * tokens, -1, self.query.shape[-1])

    def from_heads(self, out: torch.Tensor) -> torch.Tensor:
        """The way back: [R * t, Hq, D]."""
        shape = (self.rows, self.kv_heads, self.row_tokens, -1, self.query.shape[-1])
        return out.view(shape).transpose(1, 2).reshape(self.query.shape)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [R, H, n, D], copied out of their pages.

        Raises:
            ValueError: heads differ in length.
        """
        count = self.longest_tokens
        if int(self.cache.lens.min()) != count:
            raise ValueError("heads differ in length")
        pool = self.cache.pool
        pages = self.cache.table[..., : -(-count // pool.layout.page_tokens)].long()
        keys, values = (field[pages].flatten(2, 3) for field in (pool.keys, pool.values))
        return keys[:, :, :count].contiguous(), values[:, :, :count].contiguous()

    def request_pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values in an engine's usual pages [R * W, N, H, D], and a table [R, W]."""
        page_tokens = self.cache.pool.layout.page_tokens
        width = -(-self.longest_tokens // page_tokens)
        paged = []
        for field in self.dense():
            missing = width * page_tokens - field.shape[2]
            padded = torch.nn.functional.pad(field, (0, 0, 0, missing)).transpose(1, 2)
            paged.append(padded.reshape(self.rows * width, page_tokens, *padded.shape[2:]))
        order = torch.randperm(self.rows * width, device=self.query.device)
        table = order.int().view(self.rows, width)
        keys, values = (torch.empty_like(field) for field in paged)
        for target, source in ((keys, paged[0]), (values, paged[1])):
            target[order] = source
        return keys, values, table

    def head_pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the pool [P, N, 1, D] twice, table [R * H, W] and lengths [R * H]."""
        pool = self.cache.pool
        table = self.cache.table.clamp(min=0).flatten(0, 1)
        lens = self.cache.lens.flatten()
        return pool.keys.unsqueeze(2), pool.values.unsqueeze(2), table, lens


def sdpa(batch: Batch, backend: SDPBackend | None = None) -> Run:
    """torch's scaled_dot_product_attention, with a backend of its choice or of ours."""
    from torch.nn.attention.bias import causal_lower_right

    keys, values = batch.dense()
    tokens, shape = batch.row_tokens, batch.query.shape
    mask = causal_lower_right(tokens, keys.shape[2]) if tokens > 1 else None

    def run() -> torch.Tensor:
        query = batch.query.view(batch.rows, tokens, *shape[1:]).transpose(1, 2)
        out = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=batch.scale, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(shape)

    if backend is None:
        return run

    def run_with_backend() -> torch.Tensor:
        with sdpa_kernel(backend):
            return run()

    return run_with_backend


def sdpa_flash(batch: Batch) -> Run:
    """The FlashAttention that torch brings along."""
    return sdpa(batch, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn(batch: Batch) -> Run:
    """torch's cuDNN attention, for decode: it has no causal mask of the lower right corner."""
    if batch.row_tokens > 1:
        raise ValueError("only decode is compared")
    return sdpa(batch, SDPBackend.CUDNN_ATTENTION)


def vllm_flash(batch: Batch, headwise: bool = False) -> Run:
    """vLLM's FlashAttention over pages: version 3 where the card has it, else 2."""
    interface = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    version = 3 if interface.is_fa_version_supported(3) else 2

    def attend(query: torch.Tensor, pages: tuple[torch.Tensor, ...]) -> torch.Tensor:
        keys, values, table, lens, starts = pages
        return interface.flash_attn_varlen_func(
            query,
            keys,
            values,
            max_seqlen_q=batch.row_tokens,
            cu_seqlens_q=starts,
            max_seqlen_k=longest,
            seqused_k=lens,
            block_table=table,
            softmax_scale=batch.scale,
            causal=True,
            fa_version=version,
        )

    longest = batch.longest_tokens
    if headwise:
        by_head = (*batch.head_pages(), batch.starts(batch.rows * batch.kv_heads))
        return lambda: batch.from_heads(attend(batch.by_head(), by_head))
    lens = batch.cache.lens[:, 0].contiguous()
    by_request = (*batch.request_pages(), lens, batch.starts(batch.rows))
    return lambda: attend(batch.query, by_request)


def vllm_flash_headwise(batch: Batch) -> Run:
    return vllm_flash(batch, headwise=True)


def flash_attn(batch: Batch) -> Run:
    """The flash-attn package over contiguous tokens: version 3 if installed, else 2."""
    library = _flash_attn_library()
    keys, values = (field.transpose(1, 2).contiguous() for field in batch.dense())
    lens, shape = batch.cache.lens[:, 0].contiguous(), batch.query.shape

    def run() -> torch.Tensor:
        query = batch.query.view(batch.rows, batch.row_tokens, *shape[1:])
        numbers = {"cache_seqlens": lens, "softmax_scale": batch.scale, "causal": True}
        return library.flash_attn_with_kvcache(query, keys, values, **numbers).view(shape)

    return run


def flash_attn_headwise(batch: Batch) -> Run:
    """The flash-attn package over our pages; version 2 takes pages of 256 tokens only."""
    library = _flash_attn_library()
    keys, values, table, lens = batch.head_pages()
    name = "page_table" if library.__name__ == "flash_attn_interface" else "block_table"

    def run() -> torch.Tensor:
        query = batch.by_head().unflatten(0, (-1, batch.row_tokens))
        numbers = {"cache_seqlens": lens, "softmax_scale": batch.scale, "causal": True}
        out = library.flash_attn_with_kvcache(query, keys, values, **{name: table}, **numbers)
        return batch.from_heads(out)

    return run


def _flash_attn_library() -> Any:
    try:
        return importlib.import_module("flash_attn_interface")
    except ImportError:
        return importlib.import_module("flash_attn")


def torch_flash_headwise(batch: Batch) -> Run:
    """torch's own FlashAttention over our pages, in the versions of torch that take a table."""
    keys, values, table, lens = batch.head_pages()
    if keys.shape[1] % 256:
        raise ValueError("it takes pages of 256 tokens")
    starts = batch.starts(batch.rows * batch.kv_heads)
    longest = batch.longest_tokens

    def run() -> torch.Tensor:
        out = torch.ops.aten._flash_attention_forward(
            *(batch.by_head(), keys, values, starts, None, batch.row_tokens, longest),
            *(0.0, batch.row_tokens > 1, False),
            scale=batch.scale,
            seqused_k=lens,
            block_table=table,
        )
        return batch.from_heads(out[0])

    return run


def torch_flash_gathered(batch: Batch) -> Run:
    """torch's FlashAttention by head over contiguous tokens: a head-wise call without its paging.

    The copy out of the pages is not timed, so that this is the least such a call can take.
    """
    pool, lens = batch.cache.pool, batch.cache.lens.flatten()
    page_tokens, device = pool.layout.page_tokens, batch.query.device
    token = torch.arange(batch.longest_tokens, device=device)
    held = token < lens[:, None]
    entries = (token // page_tokens).expand(len(lens), -1)
    pages = batch.cache.table.flatten(0, 1).gather(1, entries)[held].long()
    slots = (token % page_tokens).expand(len(lens), -1)[held]
    keys, values = (field[pages, slots].unsqueeze(1) for field in (pool.keys, pool.values))
    ends = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    starts, longest = batch.starts(len(lens)), batch.longest_tokens

    def run() -> torch.Tensor:
        out = torch.ops.aten._flash_attention_forward(
            *(batch.by_head(), keys, values, starts, ends, batch.row_tokens, longest),
            *(0.0, batch.row_tokens > 1, False),
            scale=batch.scale,
        )
        return batch.from_heads(out[0])

    return run


def flashinfer(batch: Batch, headwise: bool = False) -> Run:
    """FlashInfer over pages; it plans a batch ahead, which is not timed."""
    library = importlib.import_module("flashinfer")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=batch.query.device)
    if headwise:
        keys, values, table, lens = batch.head_pages()
    else:
        keys, values, table = batch.request_pages()
        lens = batch.cache.lens[:, 0].contiguous()
    page_tokens, kv_heads = keys.shape[1], keys.shape[2]
    num_pages = (lens + page_tokens - 1) // page_tokens
    ends = torch.nn.functional.pad(num_pages.cumsum(0, dtype=torch.int32), (1, 0))
    index = torch.arange(table.shape[1], device=table.device)
    pages = (ends, table[index < num_pages[:, None]], (lens - 1) % page_tokens + 1)
    group = batch.query.shape[1] // batch.kv_heads
    sizes = (group * kv_heads, kv_heads, batch.query.shape[2], page_tokens)
    types = {"q_data_type": batch.query.dtype, "sm_scale": batch.scale}
    if batch.row_tokens == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(*pages, *sizes, **types)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(batch.starts(len(lens)), *pages, *sizes, causal=True, **types)
    if headwise:
        return lambda: batch.from_heads(wrapper.run(batch.by_head(), (keys, values)))
    return lambda: wrapper.run(batch.query, (keys, values))


def flashinfer_headwise(batch: Batch) -> Run:
    return flashinfer(batch, headwise=True)


def xformers(batch: Batch) -> Run:
    """xFormers over pages, for decode."""
    if batch.row_tokens > 1:
        raise ValueError("only decode is compared")
    fmha = importlib.import_module("xformers.ops.fmha")
    keys, values, table = batch.request_pages()
    page_tokens, group = keys.shape[1], batch.query.shape[1] // batch.kv_heads
    bias = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * batch.rows,
        kv_seqlen=batch.cache.lens[:, 0].tolist(),
        page_size=page_tokens,
        block_tables=table,
        device=table.device,
    )
    shape = (1, -1, batch.kv_heads, group, keys.shape[3])
    keys, values = (
        field.flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, group, -1)
        for field in (keys, values)
    )

    def run() -> torch.Tensor:
        query = batch.query.view(shape)
        out = fmha.memory_efficient_attention_forward(
            query, keys, values, attn_bias=bias, p=0.0, scale=batch.scale
        )
        return out.view(batch.query.shape)

    return run


WHOLE_REQUEST: dict[str, Peer] = {
    "sdpa": sdpa,
    "flash (torch)": sdpa_flash,
    "cudnn (torch)": sdpa_cudnn,
    "flash (vllm)": vllm_flash,
    "flash (flash-attn)": flash_attn,
    "flashinfer": flashinfer,
    "xformers": xformers,
}
HEADWISE: dict[str, Peer] = {
    "flash by head (vllm)": vllm_flash_headwise,
    "flash by head (flash-attn)": flash_attn_headwise,
    "flash by head (torch)": torch_flash_headwise,
    "flash by head, not paged (torch)": torch_flash_gathered,
    "flashinfer by head": flashinfer_headwise,
}


def is_flash(name: str) -> bool:
    """Whether a peer is a FlashAttention, which the bars are about."""
    return name.startswith("flash ")
