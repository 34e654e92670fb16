import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsbp_jax import checks

DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [jnp.asarray, np.asarray])
def test_numbers_of_every_dtype_are_numbers(dtype, make):
    one = make(1, dtype)
    assert checks.in_unit_interval("x", one) is one
    assert checks.non_negative("x", one) is one
    assert checks.at_least_one("x", one) is one
    with pytest.raises(ValueError, match=r"x must be a number in \[0, 1\], got"):
        checks.in_unit_interval("x", make(2, dtype))


def test_scalars_of_numpy_and_ml_dtypes():
    for one in (np.float32(0.5), ml_dtypes.bfloat16(0.5), np.int8(1)):
        assert checks.in_unit_interval("x", one) is one


@pytest.mark.parametrize(
    "wrong",
    [True, np.True_, "1", None, 1j, jnp.complex64(1), jnp.ones(1), jnp.array(True)],
)
def test_what_is_no_real_scalar_is_refused(wrong):
    with pytest.raises(ValueError, match="x must be a number in"):
        checks.in_unit_interval("x", wrong)


def test_nan_and_infinity_are_outside_of_every_range():
    for number in (float("nan"), float("inf"), jnp.float32(jnp.inf)):
        for check in (
            checks.in_unit_interval,
            checks.non_negative,
            checks.at_least_one,
        ):
            with pytest.raises(ValueError, match="x must be"):
                check("x", number)


def test_tracers_are_taken_on_trust_but_not_for_what_shapes_the_program():
    assert jax.jit(lambda x: checks.in_unit_interval("x", x) + 1)(5.0) == 6

    def shaping(x):
        checks.positive_int("rank", x)

    with pytest.raises(ValueError, match=r"rank must be an int .* static_args"):
        jax.jit(shaping)(3)


def test_only_python_numbers_shape_a_program():
    assert checks.is_static(1, 1.0)
    assert not checks.is_static(jnp.float32(1), 1.0)
    assert not checks.is_static(0.5, 1.0)
