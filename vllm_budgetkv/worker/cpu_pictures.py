"""Pictures whose tokens attend both ways, in layers with windows on a CPU.

vLLM's backend there attends causally. What its kernel does without a mask is what a picture needs:
with a window of W tokens, a query sees those less than W before and behind it, and no picture that
attends both ways is longer than W. So tokens of pictures attend once more, each picture as a
sequence that ends with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata


@dataclass(frozen=True)
class PictureRows:
    """Tokens of a batch that see all of their picture.

    Args:
        tokens: int64 [n], of the batch.
        metadata: a sequence for each picture, of these tokens.
    """

    tokens: torch.Tensor
    metadata: CPUAttentionMetadata

    @classmethod
    def of(
        cls,
        common: CommonAttentionMetadata,
        build: Callable[[CommonAttentionMetadata], CPUAttentionMetadata],
    ) -> Self | None:
        """Those of a batch; None if it has none.

        Args:
            common: of the batch.
            build: vLLM's metadata of a batch.
        """
        found = list(_runs(common))
        if not found:
            return None
        rows, firsts, counts, stops = (torch.tensor(each) for each in zip(*found, strict=True))
        starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
        starts[1:] = counts.cumsum(0)
        tokens = torch.arange(int(starts[-1])) - (starts[:-1] - firsts).repeat_interleave(counts)
        metadata = build(
            CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=stops.int(),
                num_reqs=len(counts),
                num_actual_tokens=len(tokens),
                max_query_len=int(counts.max()),
                max_seq_len=int(stops.max()),
                block_table_tensor=common.block_table_tensor[rows],
                slot_mapping=common.slot_mapping[tokens],
                causal=False,
            )
        )
        return cls(tokens, metadata)


def _runs(common: CommonAttentionMetadata) -> Iterator[tuple[int, int, int, int]]:
    """Row, first token in the batch, tokens, and keys of each picture of which a batch has some."""
    starts, lens = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
    for row, pictures in (common.mm_req_doc_ranges or {}).items():
        num_tokens = starts[row + 1] - starts[row]
        if num_tokens == 1:
            # decodes, or the last of a picture, which sees all of it in any case
            continue
        computed_tokens = lens[row] - num_tokens
        for first, last in pictures:
            begin = max(first, computed_tokens)
            count = min(last + 1, lens[row]) - begin
            if count > 0:
                yield row, starts[row] + begin - computed_tokens, count, last + 1
