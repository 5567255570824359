"""A row of the table of models: what a family is called, and how a tiny one of it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import Qwen2Tokenizer

    # id of a token by its name
    Ids = Callable[[str], int]
    # fields of the whole configuration, of its text part and of ids of tokens by name
    Whole = Callable[[dict[str, Any], Ids], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How a family sees.

    Args:
        whole: fields of the whole configuration, of its text part and of ids of tokens by name.
        processor: what turns pictures into pixels, of the tokenizer.
        picture: what stands for a picture in the template.
        video: what stands for a video; empty where the family has none.
        tokens: special tokens by the attribute under which a processor looks for them.
        pixels: side of the pictures of a short request.
        large_pixels: side of the pictures of a long request.
        large_pictures: in a long request.
        most_pictures: of a prompt, that vLLM's class takes.
    """

    whole: Whole
    processor: Callable[[Qwen2Tokenizer], Any]
    picture: str
    video: str = ""
    tokens: Mapping[str, str] = field(default_factory=dict)
    pixels: int = 112
    large_pixels: int = 224
    large_pictures: int = 6
    most_pictures: int = 8


@dataclass(frozen=True, kw_only=True)
class Family:
    """A row.

    Args:
        name: what people call it.
        architecture: its name in a checkpoint, which vLLM's registry knows.
        config: class of Transformers or vLLM.
        fields: of the configuration of the language model, beside those of `decoder_fields`.
        sight: of families that see.
        folder: writes an instance, in the place of `config`, `fields` and `sight`.
        runs_in_stock: whether vLLM itself runs it on a CPU; else Transformers' class is the judge.
        dtype: that the engine demands; stock's numbers are compared in float32.
        engine: options that the engine needs.
        special: what its layers have that Llama's have not.
        modes: in which it runs beside model runner V1 in eager mode.
        page_quota: blocks of 32 tokens of a long request, the fewest that the layers need.
        both_ways: vLLM's attention on a CPU is made to see pictures both ways.
        refused: words of the refusal; empty where it is served.
        unbuilt: why no instance can be made; empty where one can.
    """

    name: str
    architecture: str
    config: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    sight: Sight | None = None
    folder: Callable[[Path], Path] | None = None
    runs_in_stock: bool = True
    dtype: str = "float32"
    engine: Mapping[str, Any] = field(default_factory=dict)
    special: str = ""
    modes: tuple[str, ...] = ()
    page_quota: int = 5
    both_ways: bool = False
    refused: str = ""
    unbuilt: str = ""
