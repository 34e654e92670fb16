"""The paper's two theory claims as code that runs: what is proved of spectral training.

`sde` writes an optimizer as a stochastic differential equation, to a chosen order in
the SAM radius, and puts its paths and moments beside the optimizer's own; integrating
it needs the extra `theory`. `pac_bayes` bounds the error of a network whose weights are
noisy, narrow along each layer's eigenspace and wide elsewhere. Nothing here trains
anything faster. The formulas and their sources stand in `METHODS.md`, section 9.
"""

from dsbp_jax.theory import pac_bayes as pac_bayes, sde as sde
