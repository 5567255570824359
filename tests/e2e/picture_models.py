"""Models whose pictures attend both ways, with weights in files, and what Transformers answers.

No engine may have run in the process that asks Transformers: vLLM changes its classes for good.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tests.families import folders
from tests.families.family import Family
from tests.families.seeing import gemma3_sight
from vllm_budgetkv.testing import frames, models, sliding, tokenizer, weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOURCES = (*(Path(folders.__file__).parent / file for file in folders.WRITERS), Path(__file__))


def build_gemma3(cache: Path, picture_tokens: int) -> Path:
    """Writes a Gemma 3 with pictures of 16 or 64 tokens, and windows of twice as many.

    Args:
        cache: folder of models; the model gets a folder of its own inside.
        picture_tokens: of each picture, whatever its size.

    Returns:
        The folder of the model.
    """
    family = Family(
        name="Gemma 3",
        architecture="Gemma3ForConditionalGeneration",
        config="Gemma3Config",
        sight=gemma3_sight(picture_tokens),
    )

    def write(folder: Path) -> None:
        from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

        folders.write(family, folder)
        vocabulary = AutoTokenizer.from_pretrained(folder)
        model = Gemma3ForConditionalGeneration(Gemma3Config.from_pretrained(folder)).float()
        weights.randomise(model, picture_tokens, _answers(vocabulary))
        sliding.scale_norms(model.model.language_model, sliding.FAMILIES["gemma3"])
        with torch.no_grad():
            # it adds one
            model.model.multi_modal_projector.mm_soft_emb_norm.weight.zero_()
        model.save_pretrained(folder)
        _name_as_published(folder / "model.safetensors")

    source = b"".join(file.read_bytes() for file in SOURCES) + models.source()
    digest = hashlib.sha256(source + Path(sliding.__file__).read_bytes()).hexdigest()[:12]
    return models.cached(cache, f"gemma3_pictures_{picture_tokens}-{digest}", write)


def _name_as_published(file: Path) -> None:
    """Transformers 5 leaves out a level of names that vLLM looks for, and reads it too."""
    parts = load_file(file)
    tower = "vision_tower."
    names = {name: name.replace(tower, f"{tower}vision_model.") for name in parts}
    save_file({names[name]: part for name, part in parts.items()}, file, {"format": "pt"})


def _answers(vocabulary: Any) -> list[int]:
    special = set(vocabulary.added_tokens_decoder)
    return [token for token in tokenizer.readable_tokens(vocabulary) if token not in special]


def load(folder: Path) -> tuple[PreTrainedModel, Any]:
    """The model of Transformers in float32, with attention written out, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), AutoProcessor.from_pretrained(folder)


def log_probabilities(
    model: PreTrainedModel, processor: Any, content: list[dict[str, Any]], tokens: list[int]
) -> tuple[int, torch.Tensor]:
    """What Transformers expects at the places of `tokens` behind a prompt.

    Args:
        model: of `load`; so is `processor`.
        content: of the one message, as `tests.e2e.job` takes it.
        tokens: the answer.

    Returns:
        Tokens of the prompt, and log-probabilities, [answer tokens, vocabulary].
    """
    parts = [{"type": "text", **part} if "text" in part else {"type": "image"} for part in content]
    messages = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [
        frames.render_frame(part["image"], size_pixels=tuple(part["size_pixels"]))
        for part in content
        if "image" in part
    ]
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    num_prompt = inputs["input_ids"].shape[1]
    answer = torch.tensor([tokens])
    for name, fill in (("input_ids", answer), ("token_type_ids", torch.zeros_like(answer))):
        inputs[name] = torch.cat([inputs[name], fill], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits = model(**inputs).logits[0, num_prompt - 1 : -1]
    return num_prompt, logits.log_softmax(dim=-1)
