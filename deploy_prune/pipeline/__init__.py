"""A run from recipe to bundle: stages, their cache, and the flat functions a user can fork."""
