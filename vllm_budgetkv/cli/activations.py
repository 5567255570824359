"""How much of a transformer's layer lives at once: a formula, for estimates alone."""

from __future__ import annotations

# h is the width of a layer, i that of its MLP
FORMULA = "(4 h + max(4 h, 3 i)) elements"


def layer_elements(width: int, mlp_width: int) -> int:
    """Elements of a token that live at once in a layer without gradients.

    The layer's input, the residual, the norm and the output are 4 h; beside them stand queries,
    keys, values and what attention makes of them (4 h), or gate, rise and product of the MLP
    (3 i). `tests/cli/test_activations.py` holds it against the vision tower of Transformers.
    """
    return 4 * width + max(4 * width, 3 * mlp_width)
