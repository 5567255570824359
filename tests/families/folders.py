"""Writes a tiny instance of a family: configuration, tokenizer and processor; no weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_budgetkv.testing import models, tokenizer
from vllm_budgetkv.testing.shapes import DecoderShape

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Qwen2Tokenizer

    from tests.families.family import Family

MODELS = Path(__file__).parents[2] / "build" / "models"
WRITERS = ("family.py", "folders.py", "processors.py", "vision.py", "seeing.py", "text.py")
MAX_TOKENS = 8192
# in the template of the tests
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def folder_of(family: Family, models_folder: Path = MODELS) -> Path:
    """The folder of an instance, written where it is missing."""
    if family.folder is not None:
        return family.folder(models_folder)
    source = b"".join((Path(__file__).parent / file).read_bytes() for file in WRITERS)
    name = "".join(c if c.isalnum() else "_" for c in family.name.lower())
    digest = hashlib.sha256(source + models.source()).hexdigest()[:12]
    return models.cached(models_folder, f"family-{name}-{digest}", lambda to: write(family, to))


def write(family: Family, folder: Path) -> None:
    """Write an instance."""
    vocabulary = vocabulary_of(family, folder)
    fields = text_fields(family, vocabulary)
    if family.sight is not None:
        processor = family.sight.processor(vocabulary)
        processor.chat_template = vocabulary.chat_template
        processor.save_pretrained(folder)
        fields = family.sight.whole(fields, vocabulary.convert_tokens_to_ids)
    config = config_class(family.config)(**fields)
    config.architectures = [family.architecture]
    config.save_pretrained(folder)
    if "config" in fields:
        _publish(config, folder)


def _publish(config: Any, folder: Path) -> None:
    """Leave of a configuration that holds another one, as Moondream's, what is on the hub.

    vLLM's class would read what it derived from the other one in its place.
    """
    names = ("architectures", "model_type", "config")
    plain = {name: getattr(config, name) for name in names}
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")


def config_class(name: str) -> Callable[..., Any]:
    """A class of Transformers, or of vLLM where Transformers has none of the name."""
    import transformers

    if (found := getattr(transformers, name, None)) is not None:
        return found
    from vllm.transformers_utils import configs

    return getattr(configs, name)


def vocabulary_of(family: Family, folder: Path) -> Qwen2Tokenizer:
    """The tokenizer of the tests, with the tokens and the template of the family, in `folder`."""
    from transformers import Qwen2Tokenizer

    vocabulary = tokenizer.build_tokenizer(MAX_TOKENS)
    if family.sight is None:
        vocabulary.save_pretrained(folder)
        return vocabulary
    template = tokenizer.CHAT_TEMPLATE.replace(PICTURE, family.sight.picture)
    vocabulary.chat_template = template.replace(VIDEO, family.sight.video)
    vocabulary.save_pretrained(folder)
    named = dict(family.sight.tokens)
    vocabulary = Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=named)
    vocabulary.add_special_tokens(
        {"additional_special_tokens": [*tokenizer.SPECIAL_TOKENS, *named.values()]}
    )
    vocabulary.save_pretrained(folder)
    return vocabulary


def text_fields(family: Family, vocabulary: Qwen2Tokenizer) -> dict[str, Any]:
    """Fields of the language model's configuration."""
    shape = DecoderShape(max_position_tokens=MAX_TOKENS, vocab_size=576)
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    return {
        **models.decoder_fields(shape, vocabulary),
        "bos_token_id": vocabulary.eos_token_id,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": False,
        "rope_parameters": rope,
        **family.fields,
    }
