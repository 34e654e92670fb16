"""The same meta-gradient in PyTorch, where it is installed: a peer, no dependency.

`higher` (Grefenstette et al., 2019) loops over tasks; `torch.func` maps them as
`jax.vmap` does. Networks, losses and sizes are those of the JAX rows, weights are not.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np


def peers(
    name: str, tasks: Any, *, num_steps: int, rate: float, channels: int
) -> dict[str, Callable[[], Any]]:
    """Functions that compute the meta-gradient once.

    Args:
      name: `"mlp"` or `"conv4"`.
      tasks: `(support, query)`, as JAX sees them.
      num_steps: Inner steps.
      rate: The inner learning rate.
      channels: Of conv4.

    Returns:
      By name; empty without PyTorch.
    """
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    def tensor(values: Any) -> Any:
        array = np.array(values)  # a copy, which PyTorch may own
        if array.ndim == 5:  # images: channels first
            array = np.ascontiguousarray(np.moveaxis(array, -1, 2))
        made = torch.from_numpy(array)
        return made if made.is_floating_point() else made.long()

    (xs, ys), (xq, yq) = (tuple(map(tensor, part)) for part in tasks)
    model = _network(name, channels)
    criterion = torch.nn.functional.mse_loss
    if name == "conv4":
        criterion = torch.nn.functional.cross_entropy
    found: dict[str, Callable[[], Any]] = {}

    def mapped() -> Any:
        params = dict(model.named_parameters())
        call = lambda params, x: torch.func.functional_call(model, params, (x,))
        loss = lambda params, x, y: criterion(call(params, x), y)

        def task_loss(params: Any, xs: Any, ys: Any, xq: Any, yq: Any) -> Any:
            for _ in range(num_steps):
                grads = torch.func.grad(loss)(params, xs, ys)
                params = {key: params[key] - rate * grads[key] for key in params}
            return loss(params, xq, yq)

        over = torch.func.vmap(task_loss, in_dims=(None, 0, 0, 0, 0))
        mean = lambda params: over(params, xs, ys, xq, yq).mean()
        return torch.func.grad(mean)(params)

    found["PyTorch, torch.func.vmap"] = mapped
    if importlib.util.find_spec("higher") is None:
        return found
    import higher

    def looped() -> Any:
        model.zero_grad()
        descent = torch.optim.SGD(model.parameters(), lr=rate)
        for index in range(len(xs)):
            with higher.innerloop_ctx(model, descent, copy_initial_weights=False) as (
                adapted,
                inner,
            ):
                for _ in range(num_steps):
                    inner.step(criterion(adapted(xs[index]), ys[index]))
                loss = criterion(adapted(xq[index]), yq[index]) / len(xs)
                loss.backward()
        return [param.grad for param in model.parameters()]

    found["PyTorch, higher"] = looped
    return found


def _network(name: str, channels: int) -> Any:
    """The MLP of sine waves, or the four-block network with strides."""
    from torch import nn

    if name == "mlp":
        layers = [nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(40, 1))
    layers = []
    for d_in in (1, *[channels] * 3):
        layers += [
            nn.Conv2d(d_in, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels, track_running_stats=False),
            nn.ReLU(),
        ]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]
    return nn.Sequential(*layers, *pool)
