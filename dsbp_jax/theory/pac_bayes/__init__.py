"""PAC-Bayes: how often a network with noisy weights errs, proved from its examples.

`kl` inverts the binary relative entropy, `gaussian` has the posteriors (isotropic,
diagonal, and in the eigenspaces of each layer) and the priors, `noisy` runs a loss
under one, `bound` puts the bound
together: the objective that trains a posterior, and the certificate with the error of
its own sampling included.
"""

from dsbp_jax.theory.pac_bayes.bound import (
    Certificate as Certificate,
    bound_objective as bound_objective,
    bounded_cross_entropy as bounded_cross_entropy,
    certify as certify,
    gibbs_risk as gibbs_risk,
    risk_bound as risk_bound,
)
from dsbp_jax.theory.pac_bayes.gaussian import (
    Family as Family,
    Gaussian as Gaussian,
    Prior as Prior,
    diagonal as diagonal,
    eigenbasis as eigenbasis,
    initial_prior as initial_prior,
    isotropic as isotropic,
    learned_prior as learned_prior,
)
from dsbp_jax.theory.pac_bayes.kl import (
    binary_kl as binary_kl,
    kl_inverse as kl_inverse,
)
from dsbp_jax.theory.pac_bayes.noisy import noisy as noisy
