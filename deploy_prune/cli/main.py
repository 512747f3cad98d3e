"""The `deploy-prune` command: finds the subcommand, runs it, and turns what went wrong into words and an exit code.

Exit codes: 0 done; 1 a gate or parity check failed; 2 wrong usage or recipe; 3 something asked for is not
available here; 4 an artifact is damaged or untrusted; 70 a bug in deploy-prune (with its traceback);
130 interrupted; 141 the reader of our output went away.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from deploy_prune import distributed, interrupts
from deploy_prune.errors import DeployPruneError, UnavailableError, UsageError, did_you_mean
from deploy_prune.version import __version__

# Name -> one-line summary. The module deploy_prune.cli.NAME is imported only when NAME is called, so that
# `--help` needs none of them.
COMMANDS = {
    "demo": "Prune a small model on embedded data, offline: the whole pipeline in minutes.",
    "run": "Run a recipe: search once, cut and prove a family of models, leave a bundle.",
    "search": "Score every unit of a model and write the solution path.",
    "export": "Cut models at given budgets from a solution path into a bundle.",
    "diff": "Learn what a task changes of a frozen base model: a sparse task delta.",
    "delta": "Apply, subtract, inspect or export a task delta.",
    "bench": "Time ONNX models against each other on a runtime.",
    "plan": "Import, export and cut plans, also those of other tools.",
    "generate": "Write on from a prompt with a decoder of a bundle, by onnxruntime alone.",
    "verify": "Check a bundle: hashes, graphs, outputs on stored inputs.",
    "sign": "Sign a bundle with a key or a sigstore identity.",
    "gate": "Hold a bundle's figures against release rules; exit code for CI.",
    "compare": "Compare two bundles: regression, improvement or noise.",
    "triton": "Write a Triton model repository from a bundle.",
    "push": "Upload a bundle to the Hugging Face Hub.",
    "reproduce": "Run a bundle's recipe again and compare what comes out.",
    "report": "Write a bundle's page (one HTML file, opens offline) and its charts as PNG.",
    "plot": "Draw a chart of what was measured: PNG or interactive HTML.",
    "inspect": "Show what a model, path, task delta, plan or bundle holds.",
    "doctor": "Show devices, runtimes and versions, and how to get what is missing.",
    "completion": "Print a script that completes commands in bash, zsh or fish.",
}

# Commands that may run in several processes, started by `accelerate launch` or `torchrun`.
PARALLEL = ("demo", "run", "search", "export")

EXIT_BUG = 70  # EX_SOFTWARE: kept apart from 1, which CI reads as "a gate failed"
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
LOG = "deploy-prune"
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO)


class PipeClosed(Exception):
    """Whoever read our stdout stopped; click itself would exit 1, which means a failed gate here."""


class LazyGroup(click.Group):
    """A group whose subcommands live in modules that are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"deploy_prune.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"No such command {args[0]!r}. {did_you_mean(args[0], list(COMMANDS))}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise PipeClosed from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="deploy-prune", message="%(prog)s %(version)s")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes; results and errors only.")
@click.option("-v", "--verbose", count=True, help="Say more (-v: stages and library logs, -vv: debug logs).")
@click.option("--log-file", type=click.Path(dir_okay=False), help="Append notes, errors and library logs to this file.")
@click.pass_context
def cli(ctx: click.Context, quiet: bool, verbose: int, log_file: str | None) -> None:
    """One search, a whole family of compact ONNX transformers, each proved equal to its torch twin and timed."""
    from deploy_prune.cli import console

    ctx.obj = {"verbose": verbose}
    console.set_quiet(quiet)
    if verbose or log_file:
        console.log(verbose, log_file)


def refuse_shadowed_packages() -> None:
    """Raise UnavailableError when `converters` or `bench` would be imported from somebody else's directory."""
    home = Path(__file__).resolve().parents[2]
    problems = []
    for name in ("converters", "bench"):
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or [spec.origin or "?"]) if spec else []
        if not places:
            problems.append(f"package {name!r} is not installed (expected {home / name})")
        elif Path(places[0]).resolve() != home / name:
            problems.append(f"package {name!r} comes from {places[0]}, ours is {home / name}")
    if problems:
        raise UnavailableError(
            "another package shadows a part of deploy-prune",
            problems=problems,
            remedy="Run from another directory, or take the foreign path out of PYTHONPATH.",
        )


def main(args: Sequence[str] | None = None) -> None:
    """The console script. Always leaves through SystemExit."""
    sys.exit(run_command(args))


def run_command(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code, with every failure explained on stderr."""
    with interrupts.remembered():
        return _run(args)


def _run(args: Sequence[str] | None) -> int:
    try:
        refuse_shadowed_packages()
        if distributed.launched() > 1:
            _join_processes(sys.argv[1:] if args is None else args)
        result = cli.main(args=None if args is None else list(args), prog_name="deploy-prune", standalone_mode=False)
        sys.stdout.flush()
        distributed.finish()
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except DeployPruneError as error:
        return _fail(str(error), error.exit_code, error)
    except click.exceptions.FileError as error:
        return _fail(error.format_message(), UnavailableError.exit_code, error)
    except click.ClickException as error:
        if distributed.reports(error):
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        return _fail("Interrupted; nothing half-written was kept.", EXIT_INTERRUPTED, error)
    except (PipeClosed, BrokenPipeError):
        # Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except MemoryError as error:
        return _fail(str(_out_of_memory(error)), UnavailableError.exit_code)
    except Exception as error:
        known = _environment_failure(error) or distributed.explain(error)
        if known is not None:
            return _fail(str(known), known.exit_code, known)
        traceback.print_exc()
        return _fail("This is a bug in deploy-prune: please report it with the lines above.", EXIT_BUG)


def _environment_failure(error: Exception) -> UnavailableError | None:
    """A failure of the machine rather than of the program, in words; None when it is neither."""
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return UnavailableError(
            f"the system refuses a file ({error.strerror})",
            where=str(error.filename or "a file"),
            remedy="Mend the permissions or choose another place; `--resume` goes on from the last whole stage.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UnavailableError(
            "no space left on the device",
            where=str(error.filename or "a temporary file"),
            remedy="Free some space (TMPDIR moves temporary files); `--resume` goes on from the last whole stage.",
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's, for GPU memory; importing torch to ask would be slow
        return _out_of_memory(error)
    return None


def _out_of_memory(error: BaseException) -> UnavailableError:
    return UnavailableError(
        "out of memory",
        got=str(error).splitlines()[0] if str(error) else None,
        remedy="Use a smaller batch or fewer examples (search.batch_size, refit.examples); "
        "`--resume` goes on from the last whole stage.",
    )


def _join_processes(args: Sequence[str]) -> None:
    """Meet the other processes of the launcher; all but the main one fall silent but for failures of their own."""
    from deploy_prune.cli import console

    command = next((arg for arg in args if not arg.startswith("-")), "")
    if command in COMMANDS and command not in PARALLEL:
        raise UsageError(
            f"`{command}` runs in one process",
            got=f"{distributed.launched()} processes",
            remedy=f"Start it without a launcher; {', '.join(PARALLEL)} use several.",
        )
    distributed.start()
    if not distributed.is_main():
        console.set_quiet(True, for_good=True)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def _fail(message: str, code: int, error: BaseException | None = None) -> int:
    sys.stdout.flush()
    with contextlib.suppress(UnavailableError):  # a log that cannot be written is what may have failed
        logging.getLogger(LOG).error("%s", message)
    if error is None or distributed.reports(error):
        own = f"process {distributed.index()}: " if distributed.index() else ""
        print(own + message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
