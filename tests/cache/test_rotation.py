"""Stored queries turned to another position, against rotating the bare query there directly."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_budgetkv.cache.probe.rotation import inverse_frequencies, rotate

HEAD_SIZE = 32


def frequencies(rotary: int, base: float = 10_000.0) -> torch.Tensor:
    return base ** -(torch.arange(0, rotary, 2).double() / rotary)


def table(num_positions: int, inv_freq: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """float64 [positions, rotary]: cosines, then sines, as rotary embeddings cache them."""
    angles = torch.arange(num_positions).double()[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def embed(
    query: torch.Tensor, axes: torch.Tensor, inv_freq: torch.Tensor, is_neox: bool
) -> torch.Tensor:
    """Rotary embedding from its definition, pair by pair, in float64.

    Args:
        query: float64 [M, Hq, D].
        axes: [M, rotary / 2], position on the axis that the pair belongs to.
    """
    half = inv_freq.shape[0]
    out = query.clone()
    for pair in range(half):
        i, j = (pair, pair + half) if is_neox else (2 * pair, 2 * pair + 1)
        turn = torch.polar(torch.ones(len(query)).double(), axes[:, pair] * inv_freq[pair])
        turned = torch.complex(query[..., i], query[..., j]) * turn[:, None]
        out[..., i], out[..., j] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("rotary", [HEAD_SIZE, 16, 10])
@pytest.mark.parametrize("distance", [0, 1, 977, -35, 30_000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)], ids=["f32", "bf16"]
)
def test_turning_on_equals_rotating_there(
    is_neox: bool, rotary: int, distance: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(rotary)
    bare = torch.randn(5, 6, HEAD_SIZE, generator=generator).double()
    inv_freq = frequencies(rotary)
    positions = torch.tensor([40.0, 41, 77, 900, 12_345]).double()[:, None].expand(5, rotary // 2)
    stored = embed(bare, positions, inv_freq, is_neox).to(dtype)
    turned = rotate(stored, torch.full((5,), distance), inv_freq.float(), is_neox)
    expected = embed(bare, positions + distance, inv_freq, is_neox)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned.double(), expected, atol=tolerance, rtol=0)
    assert torch.equal(turned[..., rotary:], stored[..., rotary:])


def test_each_row_has_its_own_distance() -> None:
    bare = torch.randn(3, 2, HEAD_SIZE, generator=torch.Generator().manual_seed(1)).double()
    inv_freq = frequencies(HEAD_SIZE)
    start = torch.tensor([5.0, 60, 7]).double()[:, None].expand(3, HEAD_SIZE // 2)
    distance = torch.tensor([100 - 5, 100 - 60, 100 - 7], dtype=torch.int32)
    turned = rotate(embed(bare, start, inv_freq, True).float(), distance, inv_freq.float(), True)
    expected = embed(bare, torch.full_like(start, 100), inv_freq, True)
    torch.testing.assert_close(turned.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True], ids=["sections", "interleaved axes"])
def test_mrope_text_turns_in_one_dimension(interleaved: bool) -> None:
    """A text token has one id on all three axes, so whichever axis a pair takes, one turn fits.

    A vision token has not: turning it by one distance is wrong, which is why none is in the probe.
    """
    half = HEAD_SIZE // 2
    axis_of_pair = torch.arange(half) % 3 if interleaved else torch.arange(half) * 3 // half
    bare = torch.randn(1, 2, HEAD_SIZE, generator=torch.Generator().manual_seed(2)).double()
    inv_freq = frequencies(HEAD_SIZE)
    text, later = torch.tensor([41.0, 41, 41]).double(), torch.tensor([500.0, 500, 500]).double()
    vision = torch.tensor([41.0, 45, 60]).double()
    expected = embed(bare, later[axis_of_pair][None], inv_freq, True)
    for axes, equal in ((text, True), (vision, False)):
        stored = embed(bare, axes[axis_of_pair][None], inv_freq, True).float()
        turned = rotate(stored, torch.tensor([500 - 41]), inv_freq.float(), True).double()
        assert torch.allclose(turned, expected, atol=1e-4) == equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1.37], ids=["plain", "mscale"])
@pytest.mark.parametrize(("base", "rotary"), [(1e4, 64), (1e6, 128)])
@pytest.mark.parametrize("num_positions", [2, 1000, 40_000])
def test_frequencies_are_as_good_as_the_table(
    dtype: torch.dtype, scale: float, base: float, rotary: int, num_positions: int
) -> None:
    """A turn over the length of the table is off by no more than the table's own rounding."""
    inv_freq = frequencies(rotary, base)
    found = inverse_frequencies(table(num_positions, inv_freq, scale).to(dtype))
    assert found.dtype == torch.float32
    error = (found.double() - inv_freq).abs() * (num_positions - 1)
    assert error.max() <= 4 * torch.finfo(dtype).eps + num_positions * 1e-7


def test_frequencies_of_the_engine() -> None:
    """The recovered rotation turns what the engine's own M-RoPE rotated."""
    rotary_embedding = pytest.importorskip("vllm.model_executor.layers.rotary_embedding.mrope")
    config = pytest.importorskip("vllm.config")
    with config.set_current_vllm_config(config.VllmConfig()):
        rope = rotary_embedding.MRotaryEmbedding(
            HEAD_SIZE, HEAD_SIZE, 4096, 1e6, True, torch.float32, mrope_section=[4, 6, 6]
        )
    query = torch.randn(3, 2 * HEAD_SIZE, generator=torch.Generator().manual_seed(3))
    rotated = [
        rope.forward_native(torch.tensor([start, start + 1, start + 9]).expand(3, 3), query, query)
        for start in (17, 3017)
    ]
    stored, expected = (queries.view(3, 2, HEAD_SIZE) for queries, _ in rotated)
    inv_freq = inverse_frequencies(rope.cos_sin_cache)
    turned = rotate(stored, torch.full((3,), 3000), inv_freq, rope.is_neox_style)
    torch.testing.assert_close(turned, expected, atol=2e-3, rtol=0)


def test_joined_tables_are_refused() -> None:
    """LongRoPE keeps two tables in one; no frequency fits both halves."""
    halves = [table(2000, frequencies(32) / factor) for factor in (1.0, 1.5)]
    with pytest.raises(ValueError, match="off by up to .* radians"):
        inverse_frequencies(torch.cat(halves))


def test_nan_in_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="nan radians"):
        inverse_frequencies(torch.full((100, 32), math.nan))


def test_short_table_is_refused() -> None:
    with pytest.raises(ValueError, match="1 rows; 2 or more"):
        inverse_frequencies(table(1, frequencies(32)))


def test_too_many_frequencies_are_refused() -> None:
    with pytest.raises(ValueError, match="40 elements from 0 on, but a query has 32"):
        rotate(torch.zeros(1, 1, 32), torch.zeros(1), torch.ones(20), True)
