"""States on the disk, written whole or not at all."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

KEEP = 2  # checkpoints


class Checkpoints:
    """The latest states of a run, each field of a state an item of its own.

    Args:
      path: The folder.
    """

    def __init__(self, path: Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEEP, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(path.resolve(), options=options)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, /, **items: Any) -> None:
        """Saves pytrees of arrays by name; those without a leaf are left out."""
        saved = {
            name: ocp.args.StandardSave(stored)
            for name, tree in items.items()
            if (stored := _storable(tree))
        }
        self._manager.save(step, args=ocp.args.Composite(**saved))

    def restore(self, step: int, /, **like: Any) -> dict[str, Any]:
        """Reads what `save` wrote.

        Args:
          step: The step.
          **like: For each item a pytree of the same structure, shapes and dtypes.

        Returns:
          The items by name.
        """
        abstract = {
            name: ocp.args.StandardRestore(
                jax.tree.map(ocp.utils.to_shape_dtype_struct, stored)
            )
            for name, tree in like.items()
            if (stored := _storable(tree))
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**abstract))
        return {
            name: _restored(restored[name], tree) if name in abstract else tree
            for name, tree in like.items()
        }

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(tree: Any) -> dict[str, jax.Array]:
    """The leaves by path; random keys as the numbers behind them.

    Leaves without an element (GaLore has such) are left out: orbax takes none.
    """
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            jax.random.key_data(leaf) if _is_key(leaf) else leaf
        )
        for path, leaf in leaves
        if leaf.size
    }


def _restored(stored: dict[str, jax.Array], like: Any) -> Any:
    """The inverse of `_storable`."""

    def leaf(path: Any, old: jax.Array) -> jax.Array:
        if not old.size:
            return old
        new = stored[jax.tree_util.keystr(path, simple=True, separator="/")]
        if _is_key(old):
            return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
        return new

    return jax.tree.map_with_path(leaf, like)
