"""`deploy-prune completion`: the shell script that completes commands, options and recipe names."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print a script that completes commands in bash, zsh or fish.")
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print what SHELL must read to complete `deploy-prune` commands and options.

    \b
    bash:  deploy-prune completion bash > ~/.local/share/bash-completion/completions/deploy-prune
    zsh:   deploy-prune completion zsh  > ~/.zfunc/_deploy-prune        (a directory of $fpath)
    fish:  deploy-prune completion fish > ~/.config/fish/completions/deploy-prune.fish
    """
    from click.shell_completion import get_completion_class

    from deploy_prune.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "deploy-prune", "_DEPLOY_PRUNE_COMPLETE").source())
