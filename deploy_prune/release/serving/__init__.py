"""What serves a bundle without deploy-prune: run.py inside it, a Triton model repository, the Hub."""
