"""SmolLM2-135M-Instruct with eyes for words on frames: an Idefics3 folder that vLLM loads.

    python -m benchmarks.real.eyes

The text model is that of `weights.py` to the bit. Four special tokens of its vocabulary, which were
made for source code, take the names of Idefics3's tokens and keep their embeddings. So a frame is
19 tokens: two of text before its 16 cells, one behind them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks.real import weights
from benchmarks.real.cells import CELL_PIXELS, CELLS, FRAME_PIXELS, vocabulary
from benchmarks.real.eyes_fit import HIDDEN, NORM_EPS, fit
from benchmarks.real.made import made_once
from benchmarks.real.packages import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

EYES = FOLDER / "smollm2-eyes"
LABEL = f"{weights.LABEL}, with eyes for words on frames"
RENAMED = {
    "<repo_name>": "<fake_token_around_image>",
    "<reponame>": "<global-img>",
    "<file_sep>": "<image>",
    "<filename>": "<end_of_utterance>",
}
IMAGE = "<image>"
FRAME_TOKENS = CELLS + 3
# Llama's names in Idefics3
TEXT = "model.text_model."


def eyes_folder() -> Path:
    """The folder of the model; fitted and written the first time.

    Raises:
        OSError: a package cannot be fetched.
        ValueError: what came is not what was pinned, or two words look alike.
    """
    return made_once(EYES, lambda draft: write(weights.model_folder(), draft))


def write(text: Path, folder: Path) -> None:
    """Write tokenizer, processor, weights and config of the model with eyes."""
    tokenizer = write_processor(text, folder)
    words = vocabulary(tokenizer)
    write_weights(text, folder, words)
    llama = json.loads((text / "config.json").read_text(encoding="utf-8"))
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        "scale_factor": 1,
        "tie_word_embeddings": True,
        "dtype": llama["dtype"],
        "bos_token_id": llama["bos_token_id"],
        "eos_token_id": llama["eos_token_id"],
        "pad_token_id": llama["eos_token_id"],
        "text_config": llama | {"pad_token_id": llama["eos_token_id"]},
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": HIDDEN,
            "intermediate_size": len(words.ids),
            "num_hidden_layers": 1,
            "num_attention_heads": HIDDEN // 64,
            "image_size": FRAME_PIXELS,
            "patch_size": CELL_PIXELS,
            "layer_norm_eps": NORM_EPS,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def write_weights(text: Path, folder: Path, words: Any) -> None:
    """The language model's weights as they are, in bf16, and the tower's in float32."""
    import torch
    from safetensors.torch import load_file, save_file

    language = load_file(text / "model.safetensors")
    table = language["model.embed_tokens.weight"][list(words.ids)].float().numpy()
    found = {TEXT + name.removeprefix("model."): weight for name, weight in language.items()}
    found |= {name: torch.from_numpy(weight) for name, weight in fit(words, table).items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def write_processor(text: Path, folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer with the new names, chat template, and image processor; returns the tokenizer."""
    from transformers import AutoTokenizer, Idefics3ImageProcessor, Idefics3Processor

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        content = (text / name).read_text(encoding="utf-8")
        for old, new in RENAMED.items():
            content = content.replace(f'"{old}"', f'"{new}"')
        (folder / name).write_text(content, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    side = {"longest_edge": FRAME_PIXELS}
    images = Idefics3ImageProcessor(do_image_splitting=False, size=side, max_image_size=side)
    template = tokenizer.chat_template
    Idefics3Processor(
        images, tokenizer, image_seq_len=CELLS, chat_template=template
    ).save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    print(eyes_folder())  # noqa: T201
