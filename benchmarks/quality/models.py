"""Which model is asked: the lab's own, known by its sizes, or any that vLLM can load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from benchmarks.quality import reader


def check_model(model: str) -> None:
    """Refuses a folder that is none of a model; a name of a hub is left to vLLM.

    Raises:
        FileNotFoundError: `model` is a path without a `config.json`.
    """
    path = Path(model)
    if (path.is_absolute() or path.exists()) and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{model} holds no model; `make train` writes the lab's own, or pass --model"
        )


def fingerprint(model: str) -> str:
    """A hash of a model's files; the name itself where it is none of a folder."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".jinja"):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def knows_notation(model: str) -> bool:
    """Whether the model was trained on the tasks: it has the sizes of the lab's own."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return False
    sizes = json.loads(file.read_text(encoding="utf-8")).get("text_config", {})
    return (sizes.get("vocab_size"), sizes.get("hidden_size")) == (
        reader.SHAPE.vocab_size,
        reader.SHAPE.hidden,
    )
