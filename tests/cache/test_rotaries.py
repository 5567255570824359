"""How queries turn is found and proven on layers that use vLLM's own rotary embeddings."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vllm_budgetkv.cache.probe.rotaries import find_rotaries, turns_probe
from vllm_budgetkv.cache.probe.rotation import Temperature
from vllm_budgetkv.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_budgetkv.cache.probe.bank import Rotary

ropes = pytest.importorskip("vllm.model_executor.layers.rotary_embedding")
vllm_config = pytest.importorskip("vllm.config")

HEAD_SIZE = 64
NUM_HEADS = 4
MAX_TOKENS = 4096
ORIGINAL = 1024
SCALED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 16 for i in range(32)],
    "long_factor": [1.5 + i / 4 for i in range(32)],
    "original_max_position_embeddings": ORIGINAL,
}
SECTIONS = {"mrope_section": [16, 8, 8]}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.25},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "ntk mixed": {"rope_type": "ntk", "factor": 4.0, "mixed_b": 0.5},
    "dynamic alpha": {"rope_type": "dynamic", "alpha": 1000.0},
    "dynamic factor": {"rope_type": "dynamic", "factor": 4.0, "max_trained_positions": 2048},
    "yarn": {"rope_type": "yarn", **SCALED},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "longrope": LONG,
    "mrope": {"rope_type": "default", **SECTIONS},
    "mrope interleaved": {
        "rope_type": "default",
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
    "mrope yarn": {"rope_type": "yarn", **SECTIONS, **SCALED},
    "bailing mrope": {"rope_type": "bailing_mrope", "mrope_section": [16, 8, 8]},
    "openpangu": {"rope_type": "openpangu", **SECTIONS, "mrope_interleaved": True},
    "deepseek yarn": {"rope_type": "deepseek_yarn", "mscale": 0.7, **SCALED},
    "deepseek v4": {"rope_type": "deepseek_yarn", "is_deepseek_v4": True, **SCALED},
}
NEOX_ONLY = {"proportional", "longrope", "openpangu"}
TABLE = ("cos_sin_cache", "long_short_cos_sin_cache")


class Layer(torch.nn.Module):
    """Makes queries as an attention layer of a model does, around a rotary embedding of vLLM's.

    Args:
        rope: rotary embedding; None rotates nothing. It rotates its own head size.
        start: first element of the head that is given to it.
        gain: [D], weight of a norm behind the rotation.
        temperature: a factor behind it.
        learned: whether positions enter by an embedding.
    """

    def __init__(
        self,
        rope: torch.nn.Module | None,
        *,
        start: int = 0,
        gain: torch.Tensor | None = None,
        temperature: Temperature | None = None,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.rotary_emb = rope
        self.attn = torch.nn.Identity()
        self.attn.layer_name = "attn"  # type: ignore[assignment]
        self.start, self.temperature = start, temperature
        if gain is not None:
            self.query_norm = torch.nn.LayerNorm(HEAD_SIZE, bias=False)
            self.query_norm.weight.data = gain
        if learned:
            self.embed_positions = torch.nn.Embedding(MAX_TOKENS, NUM_HEADS * HEAD_SIZE)

    def queries(self, bare: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[M, Hq, D] of `bare`, [M, Hq, D], at `positions`, int64 [M]."""
        if hasattr(self, "embed_positions"):
            bare = bare + self.embed_positions(positions).view_as(bare)
        query = bare.clone()
        if self.rotary_emb is not None:
            head_size = HEAD_SIZE - self.start
            takes_heads = type(self.rotary_emb).__name__.startswith("Deepseek")
            has_axes = getattr(self.rotary_emb, "mrope_section", None) is not None
            part = query[..., self.start :].clone()
            flat = part if takes_heads else part.flatten(-2)
            axes = positions.expand(3, -1).contiguous() if has_axes else positions
            turned, _ = self.rotary_emb(axes, flat, flat.clone())
            query[..., self.start :] = turned.reshape(-1, NUM_HEADS, head_size)
        if hasattr(self, "query_norm"):
            query = query * self.query_norm.weight.to(query.dtype)
        if self.temperature is not None:
            query = (query * self.temperature.factor(positions)[:, None, None]).to(query.dtype)
        return query


@pytest.fixture(autouse=True)
def engine_config() -> Iterator[None]:
    """vLLM reads its configuration when it builds a rotary embedding."""
    config = vllm_config.VllmConfig(compilation_config={"custom_ops": ["all"]})
    config.model_config = SimpleNamespace(max_model_len=MAX_TOKENS, dtype=torch.float32)
    with vllm_config.set_current_vllm_config(config):
        yield


def build_rope(kind: str, is_neox: bool, dtype: torch.dtype, head_size: int = HEAD_SIZE) -> Any:
    rope = ropes.get_rope(head_size, MAX_TOKENS, is_neox, {**KINDS[kind], "rope_theta": 1e4}, dtype)
    # vLLM keeps one object per configuration, and a test may change its own
    return copy.deepcopy(rope)


def find(layer: torch.nn.Module, dtype: torch.dtype, **config: Any) -> dict[int, Rotary]:
    bare = torch.randn(3, NUM_HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(5))

    def sample(positions: Sequence[int]) -> dict[str, torch.Tensor]:
        places = torch.tensor(positions)
        rows = bare.to(dtype).repeat_interleave(len(positions), dim=0)
        queries = layer.get_submodule("0").queries(rows, places.repeat(3))  # type: ignore[operator]
        return {"attn": queries.view(3, len(positions), NUM_HEADS, HEAD_SIZE)}

    return find_rotaries(
        layer, SimpleNamespace(**config), sample, MAX_TOKENS, 8, layer_index={"attn": 0}
    )


def assert_turns(layer: Layer, rotary: Rotary | None, dtype: torch.dtype) -> None:
    """Queries of other tokens at other positions turn as well as rounding allows."""
    generator = torch.Generator().manual_seed(6)
    bare = torch.randn(40, NUM_HEADS, HEAD_SIZE, generator=generator).to(dtype)
    start = torch.randint(0, MAX_TOKENS, (40,), generator=generator)
    wanted = torch.randint(0, MAX_TOKENS, (40,), generator=generator)
    turned = layer.queries(bare, start)
    if rotary is not None:
        turned = rotary.turn(turned, start, wanted)
    expected = layer.queries(bare, wanted)
    off = (turned - expected).float().flatten(1).norm(dim=-1) / expected.float().flatten(1).norm(
        dim=-1
    )
    assert turned.dtype == dtype
    assert off.max() <= 4 * torch.finfo(dtype).eps + 4 * MAX_TOKENS * 2**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "is_neox"),
    [(kind, is_neox) for kind in KINDS for is_neox in {True, kind in NEOX_ONLY}],
)
def test_every_kind_of_rope(kind: str, is_neox: bool, dtype: torch.dtype) -> None:
    layer = Layer(build_rope(kind, is_neox, dtype))
    found = find(torch.nn.Sequential(layer), dtype)
    assert_turns(layer, found[0], dtype)


@pytest.mark.parametrize("max_model_len", [ORIGINAL, ORIGINAL + 1], ids=["short", "long"])
def test_longrope_turns_by_the_table_in_use(max_model_len: int) -> None:
    """Both tables of LongRoPE lie in one tensor, of which no single rotation exists."""
    config = vllm_config.get_current_vllm_config()
    config.model_config.max_model_len = max_model_len
    rope = ropes.Phi3LongRoPEScaledRotaryEmbedding(
        *(HEAD_SIZE, HEAD_SIZE, MAX_TOKENS, ORIGINAL, 1e4, True, torch.float32),
        *(LONG["short_factor"], LONG["long_factor"]),
    )
    found = find(torch.nn.Sequential(Layer(rope)), torch.float32)
    factor = LONG["short_factor" if max_model_len == ORIGINAL else "long_factor"]
    expected = 1e4 ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE) / torch.tensor(factor)
    torch.testing.assert_close(found[0].inv_freq, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("start", [16, 32, 48])
def test_a_rotary_part_at_the_end_of_the_head(
    start: int, is_neox: bool, dtype: torch.dtype
) -> None:
    """MiniCPM3 and DeepSeek without MLA: the first elements were turned instead."""
    layer = Layer(build_rope("default", is_neox, dtype, HEAD_SIZE - start), start=start)
    found = find(torch.nn.Sequential(layer), dtype)
    assert found[0].start == start
    assert_turns(layer, found[0], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_behind_the_rotation(dtype: torch.dtype) -> None:
    """HunYuan: its weights scale the elements of a pair differently."""
    gain = 0.5 + torch.rand(HEAD_SIZE, generator=torch.Generator().manual_seed(7))
    layer = Layer(build_rope("default", True, dtype), gain=gain)
    assert_turns(layer, find(torch.nn.Sequential(layer), dtype)[0], dtype)


TEMPERATURES: dict[str, tuple[Temperature, dict[str, Any]]] = {
    "ministral": (
        Temperature(0.1, ORIGINAL),
        {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": ORIGINAL}},
    ),
    "ministral in transformers": (
        Temperature(0.1, ORIGINAL),
        {
            "rope_parameters": {
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": ORIGINAL,
            }
        },
    ),
    "llama 4": (
        Temperature(0.2, 500, shift_tokens=1),
        {"attn_temperature_tuning": True, "attn_scale": 0.2, "floor_scale": 500},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["default", None], ids=["rope", "no rope"])
@pytest.mark.parametrize("name", TEMPERATURES)
def test_a_factor_that_grows_with_the_position(
    name: str, kind: str | None, dtype: torch.dtype
) -> None:
    temperature, config = TEMPERATURES[name]
    rope = build_rope(kind, True, dtype) if kind else None
    layer = Layer(rope, temperature=temperature)
    found = find(torch.nn.Sequential(layer), dtype, **config)
    assert_turns(layer, found[0], dtype)


def test_a_factor_that_no_configuration_tells_is_refused() -> None:
    layer = Layer(build_rope("default", True, torch.bfloat16), temperature=Temperature(0.1, 2000))
    with pytest.raises(ValueError, match="in a way that is not known"):
        find(torch.nn.Sequential(layer), torch.bfloat16)


def test_a_rotation_that_stands_elsewhere_in_the_model() -> None:
    """Models of Transformers keep one at the top: they were taken for models without."""
    rope = build_rope("default", True, torch.float32)
    layer = Layer(rope)
    top = torch.nn.Module()
    inv_freq = 1e4 ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    top.register_buffer("inv_freq", inv_freq)
    # vLLM's own is out of sight, as if the layer were given cosines and sines
    del layer._modules["rotary_emb"]
    layer.__dict__["rotary_emb"] = rope
    found = find(torch.nn.Sequential(layer, top), torch.float32)
    assert_turns(layer, found[0], torch.float32)


def test_a_layer_without_rotation_is_served() -> None:
    """NoPE layers of Llama 4 and SmolLM3, in a model that has a rotation elsewhere."""
    model = torch.nn.Sequential(Layer(None), build_rope("default", True, torch.float32))
    assert find(model, torch.float32, rope_parameters={"rope_theta": 1e4}) == {}


def test_learned_positions_need_no_turn() -> None:
    """OPT and GPT-2."""
    assert find(torch.nn.Sequential(Layer(None, learned=True)), torch.float32) == {}


def hidden(rope: torch.nn.Module) -> torch.nn.Module:
    """The same rotation, whose table nobody finds."""
    for name in TABLE:
        if hasattr(rope, name):
            rope.__dict__[f"_{name}"] = rope._buffers.pop(name)
    rope.forward = lambda *args: _with_table(rope, *args)  # type: ignore[method-assign]
    return rope


def _with_table(rope: Any, *args: torch.Tensor) -> Any:
    return rope.forward_static(
        *args, rope.head_size, rope.rotary_dim, rope._cos_sin_cache, rope.is_neox_style
    )


@pytest.mark.parametrize("learned", [False, True], ids=["", "learned positions too"])
def test_unknown_is_not_taken_for_none(learned: bool) -> None:
    rope = hidden(build_rope("default", True, torch.float32))
    config = {"rope_parameters": {"rope_theta": 1e4}} if learned else {}
    with pytest.raises(ValueError, match=r"1 of 1 layers \(Layer\).*--kv-policy full, window"):
        find(torch.nn.Sequential(Layer(rope, learned=learned)), torch.float32, **config)


class Switching(torch.nn.Module):
    """Rotates by another table once a batch holds a long request, as LongRoPE in Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.short = build_rope("default", True, torch.float32)
        self.long = build_rope("linear", True, torch.float32)

    def forward(self, positions: torch.Tensor, *args: torch.Tensor) -> Any:
        rope = self.long if positions.max() >= ORIGINAL else self.short
        return rope(positions, *args)


def test_a_rotation_that_follows_the_batch_is_refused() -> None:
    """Each of its two tables fits half of what is seen."""
    with pytest.raises(ValueError, match="a shorter --max-model-len"):
        find(torch.nn.Sequential(Layer(Switching())), torch.float32)


class Unsteady(torch.nn.Module):
    """Rotates equal queries of one position each in another way."""

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
        places = torch.arange(len(positions)) * 7
        return build_rope("default", True, torch.float32)(places, query, key)


def test_noise_excuses_nothing() -> None:
    """Equal tokens got queries that differed by 60 %, so whatever was guessed was within it."""
    with pytest.raises(ValueError, match="in a way that is not known"):
        find(torch.nn.Sequential(Layer(Unsteady())), torch.float32)


def test_layers_that_turn_alike_share_an_object() -> None:
    """So that a compaction turns the queries of all of them at once."""
    rope = build_rope("default", True, torch.float32)
    layers = torch.nn.ModuleList([Layer(rope) for _ in range(3)])
    index = {}
    for number, layer in enumerate(layers):
        layer.attn.layer_name = f"attn{number}"
        index[f"attn{number}"] = number
    bare = torch.randn(3, NUM_HEADS, HEAD_SIZE)

    def sample(positions: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = bare.repeat_interleave(len(positions), dim=0)
        queries = layers[0].queries(rows, torch.tensor(positions).repeat(3))
        return dict.fromkeys(index, queries.view(3, -1, NUM_HEADS, HEAD_SIZE))

    found = find_rotaries(layers, SimpleNamespace(), sample, MAX_TOKENS, 4, layer_index=index)
    assert len(found) == 3 and len(set(map(id, found.values()))) == 1


def test_which_policies_turn_queries() -> None:
    assert {name for name, policy in POLICIES.items() if turns_probe(policy)} == {
        "hybrid",
        "streammem",
    }
