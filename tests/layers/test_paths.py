import pytest
from flax import nnx
from jax.tree_util import DictKey, GetAttrKey

from dsbp_jax.layers import canonical_path, leaves_by_path, require_paths


def test_trailing_value_attribute_is_dropped():
    path = (DictKey("dense"), DictKey("kernel"))
    assert canonical_path((*path, GetAttrKey("value"))) == "dense/kernel"
    assert canonical_path((*path, DictKey("value"))) == "dense/kernel/value"
    assert canonical_path(()) == ""


def test_nnx_variables_and_plain_arrays_agree():
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    names = list(leaves_by_path(params))
    assert sorted(names) == ["bias", "kernel"]
    assert list(leaves_by_path(nnx.to_pure_dict(params))) == names


def test_missing_paths_name_the_nearest():
    require_paths(["a"], ["a", "b"], "bases")
    with pytest.raises(ValueError, match=r"nearest of its 2 paths is 'params/d/w'"):
        require_paths(["d/w"], ["params/d/w", "d/x"], "bases")
    with pytest.raises(ValueError, match=r"it is empty"):
        require_paths(["d/w"], [], "bases")
