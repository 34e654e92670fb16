"""Running a function on every task of a batch, on one device or many."""

from collections.abc import Callable
from typing import Any

import jax

from dsbp_jax import checks

TaskAxis = str | int


def check_task_axis(task_axis: Any) -> TaskAxis:
    """The value if it says how to run tasks, or a ValueError.

    Example:
      >>> check_task_axis("loop")
      Traceback (most recent call last):
      ...
      ValueError: task_axis must be "auto", "vmap", "map" or a number of tasks of at ...
    """
    if isinstance(task_axis, str) and task_axis in ("auto", "vmap", "map"):
        return task_axis
    try:
        return checks.positive_int("task_axis", task_axis)
    except ValueError:
        raise ValueError(
            'task_axis must be "auto", "vmap", "map" or a number of tasks of at least '
            f"1 to run at once, got {task_axis!r}"
        ) from None


def num_tasks(tasks: Any) -> int:
    """How many tasks a batch has.

    Args:
      tasks: `(support, query)`, every leaf with the axes `(task, example, …)`.

    Returns:
      The size of the task axis.

    Raises:
      ValueError: It is no pair, or its leaves do not share such an axis. (That of one
        task is read as that of many with one example each where the shapes allow it,
        unless these examples would be single numbers.)

    Example:
      >>> import jax.numpy as jnp
      >>> num_tasks((jnp.zeros((4, 10, 1)), jnp.zeros((4, 5, 1))))
      4
    """
    if not (isinstance(tasks, tuple | list) and len(tasks) == 2):
        raise ValueError(
            f"tasks must be a pair (support, query), got {type(tasks).__name__}"
        )
    parts = [
        [jax.numpy.shape(leaf) for leaf in jax.tree.leaves(part)] for part in tasks
    ]
    shapes = [shape for part in parts for shape in part]
    sizes = {shape[0] if len(shape) > 1 else 0 for shape in shapes}
    examples = [{shape[1:2] for shape in part} for part in parts]
    single = all(shape[1:] == (1,) for shape in shapes)
    if len(sizes) != 1 or 0 in sizes or max(map(len, examples)) > 1 or single:
        raise ValueError(
            "tasks must be (support, query) with arrays of shape (task, example, …), "
            "one number of tasks in all and one number of examples in each of the two, "
            f"got arrays of shape {', '.join(map(str, shapes)) or 'none'}; one task "
            "alone needs an axis of size 1 in front"
        )
    return sizes.pop()


def over_tasks(function: Callable[..., Any], tasks: Any, task_axis: TaskAxis) -> Any:
    """Runs a function on each task, results stacked.

    Args:
      function: Of one task.
      tasks: A pytree of arrays with a leading task axis.
      task_axis: `"vmap"` runs all at once, `"map"` one after the other, a number so
        many at once.

    Returns:
      Its results, with a leading task axis.

    Example:
      >>> import jax.numpy as jnp
      >>> over_tasks(jnp.sum, jnp.ones((3, 2)), 2).tolist()
      [2.0, 2.0, 2.0]
    """
    if task_axis == "vmap":
        return jax.vmap(function)(tasks)
    if task_axis == "map":
        return jax.lax.map(function, tasks)
    assert isinstance(task_axis, int)
    return jax.lax.map(function, tasks, batch_size=task_axis)
