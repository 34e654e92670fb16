"""The house rules: which way imports go, and who may multiply by a basis."""

import ast
import importlib
import pathlib
import types

import pytest

import dsbp_jax

PACKAGE = pathlib.Path(dsbp_jax.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each stands on those before it.
FLOORS = [
    {"checks", "meshes", "batching", "ownership", "stacks"},
    {"linalg", "layers"},
    {"tracking"},
    {"transforms", "backprop"},
    {"meta", "architecture", "transfer", "inference", "theory"},
    {"explain"},
]


def room(module):
    """The package or top-level module that a file belongs to."""
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(module):
    """Pairs of the room and the whole name of what a file imports from the package."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "dsbp_jax":
                names = [f"dsbp_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "dsbp_jax" and len(parts) > 1:
                yield parts[1], name


def floor(name):
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_imports_go_down_and_through_the_front_door(module):
    own = room(module)
    if own == "__init__":
        return
    for other, name in imports(module):
        if other == own:
            continue
        same_floor = floor(other) == floor(own) == 0
        assert floor(other) < floor(own) or same_floor, f"{own} imports {name}"
        # Of another package only what its __init__ hands out.
        assert name.count(".") == 1, f"{own} reaches into {name}"
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        package = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and package.startswith("dsbp_jax."):
            home = importlib.import_module(package)
            for alias in node.names:
                found = getattr(home, alias.name)
                inside = package.split(".")[1] == own
                assert inside or not isinstance(found, types.ModuleType), alias.name


EXPERIMENTS = sorted(PACKAGE.parent.glob("experiments/**/*.py"))


@pytest.mark.parametrize("module", [*MODULES, *EXPERIMENTS], ids=str)
def test_no_module_is_too_long(module):
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 400


def test_only_optax_jax_and_numpy_are_needed():
    allowed = {"jax", "optax", "numpy", "dsbp_jax"}
    extras = {"theory/sde/paths.py": {"diffrax"}}
    for module in MODULES:
        extra = extras.get(module.relative_to(PACKAGE).as_posix(), set())
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                assert "_src" not in name, (module, name)
                top = name.split(".")[0]
                known = allowed | extra | __import__("sys").stdlib_module_names
                assert top in known, (module, name)


PRODUCTS = {"dot", "matmul", "einsum", "vdot", "tensordot", "dot_general", "inner"}


def uses_of_vectors(tree):
    """Products that have `….vectors`, or a name bound to it, as an operand."""
    bound = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and mentions(node.value, set())
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        operands = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            operands = [node.left, node.right]
        elif isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            operands = node.args if name in PRODUCTS else []
        for operand in operands:
            if mentions(operand, bound):
                yield node.lineno


def mentions(node, bound):
    """Whether an expression is such vectors, transposed, cut or cast perhaps."""
    if isinstance(node, ast.Attribute):
        return node.attr == "vectors" or (
            node.attr in ("T", "mT") and mentions(node.value, bound)
        )
    if isinstance(node, ast.Subscript):
        return mentions(node.value, bound)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("astype", "swapaxes") and any(
            mentions(part, bound) for part in (node.func.value, *node.args)
        )
    return isinstance(node, ast.Name) and node.id in bound


def test_only_eigenspaces_multiply_by_a_basis():
    for module in MODULES:
        name = str(module.relative_to(PACKAGE))
        # linalg makes bases, and knows nothing of leaves.
        if name == "tracking/eigenspace.py" or name.startswith("linalg"):
            continue
        tree = ast.parse(module.read_text(encoding="utf-8"))
        assert not list(uses_of_vectors(tree)), name


def test_the_walk_sees_a_product_with_a_basis():
    source = "v = basis.vectors\ny = v.mT @ g\nz = jnp.matmul(b.vectors, x)"
    assert list(uses_of_vectors(ast.parse(source))) == [2, 3]
