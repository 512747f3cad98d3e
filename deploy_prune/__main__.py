"""`python -m deploy_prune` is the `deploy-prune` command."""

from deploy_prune.cli.main import main

if __name__ == "__main__":
    main()
