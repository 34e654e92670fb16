"""Spectral training for JAX: one fresh eigenbasis per layer, used everywhere.

`linalg` keeps eigenbases of operators, `layers` finds what a model's kernels
meet, `transforms` are Optax gradient transformations on both. Public names are
re-exported here; those of `linalg` stay behind their prefix.
"""

from dsbp_jax import linalg as linalg
