"""The paper's two theory claims, measured: `python -m experiments.theory NAME`.

`stochastic` puts the modified equations beside the optimizers that they stand for
(`known` is the problem with an exact answer), `certificates` bounds the error of
networks on Fashion-MNIST; `training` is one run of the latter, `record` is what every
result says of where it comes from. Everything that is no experiment is in
`dsbp_jax.theory`.
"""
