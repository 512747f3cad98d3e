"""Recovery: training after the cut, taught by the dense model, that never leaves a compact model worse than it was."""

from deploy_prune.recovery.recovered import Recovered, recover

__all__ = ["Recovered", "recover"]
