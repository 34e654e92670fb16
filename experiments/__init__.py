"""Training and measuring with `dsbp_jax`: data, models, loops and tables.

Here lives what needs a framework, a data set or a disk: image sets and their
readers, Flax models, the training loop and its configurations, reports and
benchmarks. Experiments import the package, never the reverse, and need the
`experiments` extra.
"""
