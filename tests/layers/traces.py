"""Small functions, traced: their equations, sites and products."""

from typing import NamedTuple

import jax

from dsbp_jax.layers.finder import array_leaves, trace
from dsbp_jax.layers.product import Product
from dsbp_jax.layers.rewrite import evaluate


def find(model, params, *args):
    found = trace(model, params, args, {})
    return {site.name: site for site in found.sites}, dict(found.uses)


def equation_of(fn, *args):
    """The only equation of a function."""
    (equation,) = jax.make_jaxpr(fn)(*args).jaxpr.eqns
    return equation


class Visited(NamedTuple):
    """A product, the operands of its equation and its response."""

    product: Product
    x: jax.Array
    w: jax.Array
    y: jax.Array


def visits(model, params, *args):
    """Name to what the sites of a model without control flow saw."""
    found = {}

    def visit(product, x, w, extra):
        y = product(x, w)
        found[product.site.name] = Visited(product, x, w, y)
        return y, None

    traced = trace(model, params, args, {})
    evaluate(traced, visit, array_leaves((params, args)))
    return found
