"""A small byte-level BPE tokenizer with the special tokens and chat template of Qwen2.5-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# enough English for a few dozen whole words; longer text falls back to pieces and bytes
CORPUS = """
You are a helpful assistant. What is in the picture? Which letter does the video show in this frame,
and when? Describe the image in one sentence. The answer is on the red sign in the last frame. How
many frames show a digit? Read the number in the corner of the page. The first image shows a letter,
the second image shows a number. system user assistant video image frame text letter digit number
colour left right top bottom before after
"""
MERGED_VOCABULARY = 448

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(
    max_tokens: int, corpus: str = CORPUS, vocabulary: int = MERGED_VOCABULARY
) -> Qwen2Tokenizer:
    """Trains the tokenizer.

    Args:
        max_tokens: longest input in tokens that it accepts without a warning.
        corpus: text whose frequent words become whole tokens.
        vocabulary: most tokens before the special ones.

    Returns:
        A `Qwen2Tokenizer`: 256 bytes, the merges of `corpus`, then `SPECIAL_TOKENS`, in this order
        of ids.
    """
    import json

    from tokenizers import models, trainers
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer(vocab={}, merges=[])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    backend = blank.backend_tokenizer
    backend.model = models.BPE()
    backend.train_from_iterator(corpus.splitlines(), trainer)
    trained = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_tokens,
    )


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def readable_tokens(tokenizer: Qwen2Tokenizer) -> list[int]:
    """Ids of the tokens that are printable ASCII: nothing special, no part of a UTF-8 sequence.

    A model that answers with these alone streams every token at once, since no character is ever
    incomplete.
    """
    special = set(tokenizer.all_special_ids)
    candidates = (token for token in range(len(tokenizer)) if token not in special)
    return [token for token in candidates if _is_readable(tokenizer.decode([token]))]


def _is_readable(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()
