"""A smaller convolutional network: channels before nonlinearities, and neurons.

python -m experiments.tables compression_cnn --data-dir DIR
"""

import dataclasses

from experiments import cli
from experiments.config import DataConfig, ModelConfig
from experiments.study.tables import Table


def table(scale: str) -> Table:
    """The table."""
    first = cli.load_table("compression_resnet", scale)
    config = dataclasses.replace(
        first.config,
        data=DataConfig("fashion_mnist"),
        model=ModelConfig("cnn", {"channels": (16, 32), "hidden": 128}),
        epochs=6 if scale == "cpu" else 10,
        tune_epochs=1.0,
        multiple_of=8,
    )
    return dataclasses.replace(
        first,
        title="Smaller models: a convolutional network",
        claim="Channels and neurons: what is lost before and after tuning?",
        config=config,
        contenders=(*first.contenders, "factors"),
        seeds=5,
        trial_length=1.0,
        caption=(
            "Fashion-MNIST, two blocks of convolution and two dense layers, 6 epochs "
            "of Adam, cut to half of its FLOPs and tuned for one more; `before` is the "
            "accuracy before that, latency that of a pass of 256 images; `factors` "
            "splits kernels by what their layers see, `unrepaired` has our channels "
            "and widths, and no least squares."
        ),
    )
