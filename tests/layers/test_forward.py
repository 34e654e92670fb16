import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.layers import Forward
from tests.layers.models import normal


class Depth(Forward):
    """How many equations stand behind a value; a call counts what is inside."""

    def __init__(self):
        self.keys = []

    def literal(self, atom):
        return 0

    def constant(self, var):
        return 100

    def at(self, operands, key):
        self.keys.append(key)

    def equation(self, equation, operands, key):
        return [1 + max(operands)] * len(equation.outvars)


def walked(function, *args):
    closed, walk = jax.make_jaxpr(function)(*args), Depth()
    return walk.walk(closed.jaxpr, [0] * len(args), ()), walk.keys


def test_calls_are_entered_and_their_equations_have_keys():
    inner = jax.jit(lambda x: jnp.sin(jnp.cos(x)))
    outputs, keys = walked(lambda x: jnp.tan(inner(x) + 1.0), normal(3))
    assert outputs == [4]
    assert keys == [(0,), (0, 0), (0, 1), (1,), (2,)]


def test_what_a_function_closes_over_is_told_apart():
    table = np.arange(3, dtype=np.float32)
    outputs, _ = walked(lambda x: (x * table, x * 2.0), normal(3))
    assert outputs == [101, 1]
