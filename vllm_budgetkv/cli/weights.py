"""Bytes of a model's weights once they are loaded, from the headers of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vllm_budgetkv.cli.figures import Figure, Origin
from vllm_budgetkv.start import stored

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# element types of safetensors that are loaded in the dtype of the model
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
ELEMENT_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}
INDEX_NAME = "model.safetensors.index.json"
HOW_TO_SAY = "say it with --weights 15GiB"


def weights_of(model: ModelConfig, given_bytes: int | None) -> Figure:
    """Bytes of all weights.

    Args:
        model: whose folder or repository is read: headers of safetensors, then the index of a
            sharded model, then the architecture itself, without its weights.
        given_bytes: what the user says; goes before all.

    Raises:
        ValueError: nothing tells them, and what to set.
    """
    if given_bytes is not None:
        return Figure(given_bytes, Origin.GIVEN, "--weights")
    folder = Path(model.model)
    if not folder.is_dir():
        return _of_repository(model)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return _of_counts(_counts_of(files), model, "headers of the safetensors files")
    if (folder / INDEX_NAME).is_file():
        return _of_index(folder / INDEX_NAME)
    return _of_architecture(model)


def _counts_of(files: list[Path]) -> dict[str, int]:
    """Elements by type, over all tensors of local files; only their headers are read."""
    from safetensors import safe_open

    counts: dict[str, int] = {}
    for path in files:
        with safe_open(path, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping: it has keys and no iterator)
                part = tensors.get_slice(name)
                size = 1
                for extent in part.get_shape():
                    size *= extent
                dtype = str(part.get_dtype())
                counts[dtype] = counts.get(dtype, 0) + size
    return counts


def _of_counts(counts: dict[str, int], model: ModelConfig, source: str) -> Figure:
    """Bytes of so many elements by type; a quantised model keeps every type that is stored."""
    is_quantised = model.quantization is not None and not stored.leaves_weights_alone(model)
    num_bytes = 0
    for dtype, count in counts.items():
        if dtype not in ELEMENT_BITS:
            raise ValueError(
                f"the weights have elements of type {dtype}, whose size is not known here: "
                f"{HOW_TO_SAY}"
            )
        bits = ELEMENT_BITS[dtype]
        if dtype in PLAIN_DTYPES and not is_quantised:
            bits = 8 * model.dtype.itemsize
        num_bytes += count * bits // 8
    return Figure(num_bytes, Origin.READ, source)


def _of_repository(model: ModelConfig) -> Figure:
    """From the headers that the Hugging Face hub gives of a model's files."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    # OSError, and what the hub's HTTP library raises, whichever that is
    failures = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        found = get_safetensors_metadata(model.model, revision=model.revision)
    except NotASafetensorsRepoError:
        return _of_architecture(model)
    except failures as error:
        raise ValueError(
            f"the size of the weights of {model.model} could not be read ({error}): {HOW_TO_SAY}"
        ) from error
    counts = {str(dtype): count for dtype, count in found.parameter_count.items()}
    return _of_counts(counts, model, "headers of the safetensors files on the hub")


def _of_index(path: Path) -> Figure:
    index = json.loads(path.read_text(encoding="utf-8"))
    total = index.get("metadata", {}).get("total_size")
    if not isinstance(total, int):
        raise ValueError(f"{path} tells no total_size of the weights: {HOW_TO_SAY}")
    return Figure(total, Origin.READ, f"total_size of {path.name}, as stored")


def _of_architecture(model: ModelConfig) -> Figure:
    """Parameters of the model that Transformers builds of the configuration, without memory.

    Raises:
        ValueError: it cannot, or its weights are stored otherwise than their dtype says.
    """
    import torch
    import transformers

    if model.quantization is not None and not stored.leaves_weights_alone(model):
        raise ValueError(
            f"no weights of {model.model} were found, and how large they are under "
            f"{model.quantization} no configuration tells: {HOW_TO_SAY}"
        )
    names = [n for n in model.hf_config.architectures or [] if hasattr(transformers, n)]
    if not names:
        raise ValueError(
            f"no weights of {model.model} were found, and Transformers knows none of its "
            f"architectures {model.hf_config.architectures}: {HOW_TO_SAY}"
        )
    with torch.device("meta"):
        built = getattr(transformers, names[0])(model.hf_config)
    # tied parameters come once
    count = sum(parameter.numel() for parameter in built.parameters())
    source = f"{count:,} parameters of {names[0]}, built without its weights"
    return Figure(count * model.dtype.itemsize, Origin.ESTIMATE, source)
