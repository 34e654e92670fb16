"""PAC-Bayes certificates; filled in below."""
import dataclasses
@dataclasses.dataclass(frozen=True)
class PacBayesConfig:
    """PAC-Bayes."""
    seeds: int = 3
    """Seeds."""
