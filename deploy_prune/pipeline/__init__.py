"""A run from recipe to bundle: stages, their cache, and the flat functions a user can fork."""

from deploy_prune.pipeline.run import Outcome, run_recipe

__all__ = ["Outcome", "run_recipe"]
