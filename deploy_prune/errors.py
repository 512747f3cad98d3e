"""Every failure a user can meet, as one small family of exceptions.

An error says what happened, where, what was expected, what was found and how to mend it; the command line
prints exactly that and leaves with the class's `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence


class DeployPruneError(Exception):
    """Base of all errors this project raises on purpose.

    `problems` lists every separate fault found, so that a user mends all of them at once.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        remedy: str | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.what, self.where, self.expected, self.got, self.remedy = what, where, expected, got, remedy
        self.problems = tuple(problems)
        lines = [what + (f" in {where}" if where else "")]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [f"  {label}: {text}" for label, text in (("expected", expected), ("got", got)) if text]
        if remedy:
            lines.append(remedy)
        super().__init__("\n".join(lines))

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.args[0]}"


class UsageError(DeployPruneError):
    """The request itself is wrong: an unknown name, an impossible value."""


class RecipeError(UsageError):
    """The recipe file does not describe a run."""


class PlanError(UsageError):
    """A plan does not fit the model it is applied to."""


class BudgetError(UsageError):
    """No plan of this path reaches the asked target; the message names the best reachable."""


class UnresolvedError(UsageError):
    """A search ended before it had told enough units apart."""


class UnsupportedModelError(UsageError):
    """No adapter understands the model, or not all of it; `problems` names the sites."""


class DataError(UsageError):
    """Data is empty, unlabeled or not what the task needs."""


class RefitError(UsageError):
    """The closed-form correction has no stable solution with the given data and ridge."""


class RecoveryError(UsageError):
    """Training after the cut diverged."""


class ParityError(DeployPruneError):
    """Two forms of a model that must agree do not."""

    exit_code = 1


class GateError(DeployPruneError):
    """A release rule is broken."""

    exit_code = 1


class UnavailableError(DeployPruneError):
    """Something asked for is not here: a file, a package, a provider, a device, the network, disk space."""

    exit_code = 3


class ArtifactError(DeployPruneError):
    """A file is damaged, truncated, of a wrong version or not what its manifest says."""

    exit_code = 4


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A remedy sentence that lists the `known` names, closest first."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listing = "known: " + ", ".join(sorted(known))
    return f"Did you mean {close[0]!r}? ({listing})" if close else f"({listing})"
