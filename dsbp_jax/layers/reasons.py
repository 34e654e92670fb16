"""Why a use of a leaf that is no product is no site either: one line for `explain`."""

from collections.abc import Sequence

from dsbp_jax.layers import primitives

_APART = "multiply the parts apart, or store them as one leaf"

LOOKED_UP = "looked up by index (gather)"

_KNOWN = {
    "concatenate": f"joined with data (concatenate); {_APART}",
    "stack": f"joined with data (stack); {_APART}",
    "gather": LOOKED_UP,
    "dynamic_slice": "sliced before use; jax.lax.scan over the stack is followed",
    "slice": "sliced before use; jax.lax.scan over the stack is followed",
    "while": "inside a while loop, whose number of iterations is not known",
    "shard_map": "inside a shard_map",
    "convert_element_type": "converted to a type that is not floating",
}

STACKED = (
    "stacked from several leaves before a loop; store them as one stacked leaf, or "
    "loop in Python"
)


def joined(reason: str, shape: Sequence[int]) -> str:
    """The reason of a leaf of shape `shape` that was joined with others before."""
    remedy = f"; {_APART}" if len(shape) > 1 else ""
    return f"joined with other arrays, then {reason}{remedy}"


def reason_of(equation: primitives.Equation) -> str:
    """Why a leaf cannot be followed through `equation`."""
    name = primitives.name_of(equation)
    if name in _KNOWN:
        return _KNOWN[name]
    if primitives.runs_code(equation):
        return f"enters {name}, which is not followed"
    return f"used by {name}"
