"""The race: every search and peer on one recipe's model, calibration data, budgets and evaluation; one command a model.

    python -m bench.studies.race vit-tiny-imagenet --out bench/results/race_vit_tiny.json
    python -m bench.studies.race_report bench/results/race_*.json

A budget of 0.3 removes 30 % of the parameters that lie in prunable units of any kind; every contestant gets to keep
that many parameters. Nothing is trained, unless --recover-steps asks for the same short recovery of the best few. A
race that was killed goes on at the row it was at; `--again NAME` makes one contestant's rows anew.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.studies.contestants import Contestant, Form, contestants, planned
from bench.studies.race_result import DENSE, RaceResult

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bench.peers import Prune
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.setup import Setup
    from deploy_prune.refitting import Moments
    from deploy_prune.tasks import Batch

SPARSITIES = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Terms:
    """Calibration examples, how many at once, and rows of evaluation data (None: all), the same for everyone."""

    examples: int
    batch_size: int
    limit: int | None = None


TERMS = {  # those of the committed races
    "vit-tiny-imagenet": Terms(1000, 32),
    "distilbert-sst2": Terms(1024, 32),
    "minilm-stsb": Terms(2048, 32),
    "swin-cifar10": Terms(2000, 32),
    "smollm2-wikitext": Terms(16, 2, 8),
}


@click.command(help=__doc__)
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
@click.option("--contestant", "names", multiple=True, help="Only these (default: all).")
@click.option("--sparsity", "sparsities", type=float, multiple=True, default=SPARSITIES, show_default=True)
@click.option("--examples", type=int, help="Calibration examples (default: by recipe).")
@click.option("--batch-size", type=int, help="Examples at once, which changes time and memory (default: by recipe).")
@click.option("--limit", type=int, help="Rows of evaluation data (default: by recipe).")
@click.option("--recover-steps", type=int, default=0, help="Also train the best few for so many steps each.")
@click.option(
    "--recover",
    "recover_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="How they are trained, where not by default.",
)
@click.option("--latency", is_flag=True, help="Also time ours and the best few others as ONNX files.")
@click.option("--best", type=int, default=3, show_default=True, help="How many others are trained and timed.")
@click.option("--again", multiple=True, metavar="NAME", help="Make this contestant's rows anew.")
@click.option("--fresh", is_flag=True, help="Start again.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Where paths and statistics lie (default: runs/race-RECIPE)."
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="JSON; the values per example go beside it."
)
def main(
    recipe: str,
    overrides: tuple[str, ...],
    names: tuple[str, ...],
    sparsities: tuple[float, ...],
    examples: int | None,
    batch_size: int | None,
    limit: int | None,
    recover_steps: int,
    recover_options: tuple[str, ...],
    latency: bool,
    best: int,
    again: tuple[str, ...],
    fresh: bool,
    work: Path | None,
    out: Path,
) -> None:
    from bench.studies.race_extras import recover_best, time_best
    from deploy_prune.errors import UsageError, did_you_mean
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.recipe import load_recipe
    from deploy_prune.recipe_text import checked_options, settings_of
    from deploy_prune.recovery.options import RecoverOptions

    known = contestants()
    for name in (*names, *again):
        if name not in known:
            raise UsageError(f"no contestant {name!r}", remedy=did_you_mean(name, list(known)))
    training = settings_of(recover_options, "--recover")
    if training and not recover_steps:
        raise UsageError("--recover says how the best few are trained", remedy="Give --recover-steps too.")
    if "steps" in training:
        raise UsageError("--recover takes every option but steps", remedy="Give them as --recover-steps.")
    if recover_steps:
        checked_options(RecoverOptions, {**training, "steps": recover_steps}, "recovery")
    terms = TERMS.get(Path(recipe).stem, Terms(1024, 32))
    terms = Terms(examples or terms.examples, batch_size or terms.batch_size, limit or terms.limit)
    setup = prepare(load_recipe(recipe, list(overrides)))
    race = Race.start(setup, terms, sparsities, work or Path("runs") / f"race-{Path(recipe).stem}", out, fresh=fresh)
    for name in again:
        race.forget(name)
    for name in names or known:
        race.run(known[name])
    if recover_steps:
        recover_best(race, best, recover_steps, training)
    if latency:
        time_best(race, best)


@dataclass
class Race:
    """A loaded recipe, the terms, and the result that grows row by row."""

    setup: Setup
    terms: Terms
    sparsities: tuple[float, ...]
    work: Path
    result: RaceResult
    dense_params: int
    prunable: int
    paths: dict[str, SolutionPath] = field(default_factory=dict)
    peers: dict[str, Prune] = field(default_factory=dict)
    _moments: dict[bool, Moments] = field(default_factory=dict)

    @staticmethod
    def start(
        setup: Setup, terms: Terms, sparsities: tuple[float, ...], work: Path, out: Path, *, fresh: bool = False
    ) -> Race:
        """Judge the dense model, or take up what `out` holds. Raises UsageError when that is of another race."""
        from bench.environment import note_environment
        from deploy_prune.budget import CostModel
        from deploy_prune.errors import UsageError

        if setup.recipe.diff.enabled:
            raise UsageError("a race is of the recipe's own model", where="recipe key diff", remedy="Leave diff out.")
        setup.model.to(setup.device)
        example = one_example(setup)
        costs = CostModel.measure(setup.model, setup.sites, setup.task.signature, example.inputs)
        prunable = costs.prunable(setup.sites)
        head = {
            "recipe": setup.recipe.name,
            "model": setup.recipe.portable()["model"],
            "task": setup.recipe.portable()["task"],
            "metric": setup.task.metric,
            "identity": identity_of(setup, terms),
            "sparsities": list(sparsities),
            "calibration_examples": min(terms.examples, setup.task.calibration_size),
            "evaluation_limit": terms.limit,
            "prunable": prunable,
            "params": costs.params,
            "macs": costs.macs,
            "peers": {},
            "not_supported": {},
            "environments": {},
        }
        race = Race(setup, terms, sparsities, work, RaceResult.open(out, head, fresh=fresh), costs.params, prunable)
        note_environment(race.result.head["environments"], setup.device.type)
        if not race.result.rows:
            facts = {"macs": costs.macs, "units": {}}
            race.judge(setup.model, {"contestant": DENSE, "form": DENSE, "asked": 0.0, **facts})
        return race

    @property
    def device(self) -> str:
        """Where rows are cut, refitted and judged, which they say; a path may be of an earlier run elsewhere."""
        return self.setup.device.type

    def run(self, contestant: Contestant) -> None:
        """Every form and size of a contestant that has no row yet."""
        missing = [
            (form, asked)
            for form in contestant.forms
            for asked in self.sparsities
            if f"{contestant.name}/{form}/{asked:g}" not in self.result.rows
        ]
        if not missing or contestant.name in self.result.head["not_supported"]:
            return
        for form, asked in missing:
            began = time.monotonic()
            made = self.member(contestant, form, asked)
            row = {"contestant": contestant.name, "form": form, "asked": asked}
            if isinstance(made, str):
                self.result.add({**row, "device": self.device, "error": made})
                click.echo(f"{contestant.name:12} {form:6} {asked:4.0%}  {made}")
                continue
            if made is None:
                return
            model, facts = made
            self.judge(model, {**row, **facts, "made_in_s": round(time.monotonic() - began, 2)})

    def member(self, contestant: Contestant, form: Form, asked: float) -> tuple[nn.Module, dict[str, Any]] | str | None:
        """The smaller model and its figures; in words why this size is out of reach; None when the peer cannot do it
        at all (the head then says why)."""
        from deploy_prune.errors import BudgetError

        params = self.budget(asked)
        if contestant.method is None:
            return self._peer(contestant.name, form, params)
        try:
            moments = self.moments(ours=contestant.ours or contestant.our_refit or form == "refit")
            return planned(self.setup, contestant, self.path(contestant), moments, form, params)
        except BudgetError as error:
            return str(error).splitlines()[0]

    def budget(self, asked: float) -> int:
        """Parameters that may remain: those of a plan that removes the share `asked` of the prunable ones."""
        return int(self.dense_params - asked * self.prunable)

    def judge(self, model: nn.Module, row: dict[str, Any]) -> None:
        """Add a row: the metric on the evaluation data, parameters, MACs and the values per example."""
        from deploy_prune.budget import count_params
        from deploy_prune.errors import GateError

        task = self.setup.task

        def predict(inputs: dict[str, Tensor]) -> Tensor:
            return task.signature.call(model, {name: t.to(self.setup.device) for name, t in inputs.items()})

        model.to(self.setup.device)
        try:
            quality = task.evaluate(predict, limit=self.terms.limit)
        except GateError as error:
            self.result.add({**row, "device": self.device, "error": str(error).splitlines()[0]})
            return
        params = count_params(model)
        sparsity = (self.dense_params - params) / self.prunable
        row |= {"params": params, "sparsity": sparsity, "device": self.device, **quality.to_json()}
        self.result.add(row, quality.per_example)
        click.echo(
            f"{row['contestant']:12} {row['form']:9} {row['asked']:4.0%}  params {params / self.dense_params:6.1%}  "
            f"{quality.metric} {quality.value:.4f}"
        )

    def path(self, contestant: Contestant) -> SolutionPath:
        """The contestant's path: made, or as an earlier run of this race left it. Ours is calibrated as runs do it."""
        if contestant.name not in self.paths:
            path = self._kept(contestant.name, lambda: self._searched(contestant))
            if contestant.ours:
                path = self._kept(f"{contestant.name}-calibrated", lambda: self._calibrated(path))
            self.paths[contestant.name] = path
        return self.paths[contestant.name]

    def _kept(self, name: str, make: Callable[[], SolutionPath]) -> SolutionPath:
        from deploy_prune.path import SolutionPath

        file = self._path_file(name)
        if file.exists():
            return SolutionPath.load(file)
        began = time.monotonic()
        path = make()
        self.result.head.setdefault("search_s", {})[name] = round(time.monotonic() - began, 1)
        self.result.head.setdefault("options", {})[name] = dict(path.options)
        path.save(file)
        return path

    def _searched(self, contestant: Contestant) -> SolutionPath:
        from deploy_prune.methods import search
        from deploy_prune.saved_state import SavedState

        assert contestant.method is not None
        return search(
            self.setup.model,
            self.setup.task,
            contestant.method,
            examples=self.terms.examples,
            batch_size=self.terms.batch_size,
            precision="fp32",  # on a CPU without matrix units bf16 is the slower one
            seed=self.setup.recipe.seed,
            saved=SavedState(self.work / f"search-{contestant.name}", self.result.head["identity"]),
        )

    def _calibrated(self, path: SolutionPath) -> SolutionPath:
        from deploy_prune.pipeline.losses import calibrated

        recipe = self.setup.recipe
        examples = min(recipe.search.loss_examples or self.setup.task.loss_examples, self.terms.examples)
        how = recipe.search.model_copy(update={"loss_examples": examples})
        setup = replace(self.setup, recipe=recipe.model_copy(update={"search": how}))
        try:
            return calibrated(setup, path, self.moments(ours=True))
        finally:
            self.setup.model.to(self.setup.device)

    def moments(self, *, ours: bool) -> Moments:
        """Moments of the calibration examples, as our refit takes them or, plain, as published corrections do."""
        from deploy_prune.refitting import collect_moments

        if ours not in self._moments:
            setup = self.setup
            batches = setup.task.calibration(self.terms.batch_size, self.terms.examples, setup.recipe.seed)
            losses = setup.task.calibration_losses() if ours else None
            self._moments[ours] = collect_moments(
                setup.model, setup.sites, batches, setup.task.signature, losses=losses
            )
        return self._moments[ours]

    def forget(self, name: str) -> None:
        """Drop a contestant's rows and path."""
        self.result.drop(name)
        self.result.head["not_supported"].pop(name, None)
        for file in (name, f"{name}-calibrated"):
            self._path_file(file).unlink(missing_ok=True)
        shutil.rmtree(self.work / f"search-{name}", ignore_errors=True)

    def _path_file(self, name: str) -> Path:
        self.work.mkdir(parents=True, exist_ok=True)
        return self.work / f"{name}-{self.result.head['identity'][:12]}.safetensors"

    def _peer(self, name: str, form: Form, params: int) -> tuple[nn.Module, dict[str, Any]] | str | None:
        """What a peer makes of the budget, as it is, or its decisions with our refit on top."""
        from bench.peers import PEERS, NotSupported, OutOfReach
        from bench.peers.decisions import plan_of
        from converters.surgery import compact
        from deploy_prune.budget import count_macs
        from deploy_prune.refitting import refit

        peer, setup, terms = PEERS[name], self.setup, self.terms
        head = self.result.head
        try:
            if peer.version() is None:
                raise NotSupported(f"{peer.package} is not installed; pip install '.[peers]'")
            head["peers"][name] = {"package": peer.package, "version": peer.version()}
            if name not in self.peers:
                self.peers[name] = peer.load()
            made = self.peers[name](
                setup.model, setup.task, terms.examples, terms.batch_size, params, setup.recipe.seed
            )
        except NotSupported as error:
            head["not_supported"][name] = str(error)
            self.result.save()
            click.echo(f"{name:12} not supported: {error}")
            return None
        except OutOfReach as error:
            return str(error)
        model = made.model
        facts = {
            "macs": count_macs(model, setup.task.signature, one_example(setup).inputs),
            "settings": {key: str(value) for key, value in made.settings.items()},
        }
        if form == "refit":
            plan = plan_of(setup.model, model, setup.sites, setup.recipe.model, setup.weights_sha256)
            fitted = refit(setup.model, plan, self.moments(ours=True), ridge=setup.recipe.refit.ridge)
            model = compact(fitted, plan, inplace=True, check_weights=False)
        return model, facts


def one_example(setup: Setup) -> Batch:
    """A calibration example where the model is."""
    return next(iter(setup.task.calibration(1, limit=1, seed=setup.recipe.seed))).to(setup.device)


def identity_of(setup: Setup, terms: Terms) -> str:
    """What tells one race from another: model, data, seed and terms; not the versions, which each run records."""
    import hashlib
    import json

    parts = [setup.weights_sha256, setup.recipe.portable()["task"], setup.recipe.seed, terms.examples, terms.limit]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    main()
