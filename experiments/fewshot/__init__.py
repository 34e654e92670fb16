"""Few-shot meta-learning: `python -m experiments.fewshot [PRESET] [--options]`.

`episodes` draws the tasks, `learner` compiles the outer steps and the evaluations of a
method, `training` is the loop around them, `report` writes what it found, `compare`
puts methods side by side. Everything that is no experiment is in `dsbp_jax.meta`.
"""
