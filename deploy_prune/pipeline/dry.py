"""A dry run: everything a recipe names is checked as far as that needs no download, and what a run would do is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.budget import MEASURED
from deploy_prune.dynamic.options import UPDATES
from deploy_prune.errors import DeployPruneError, UnavailableError
from deploy_prune.pipeline.checks import check_model
from deploy_prune.pipeline.decoders import check_cache
from deploy_prune.pipeline.losses import calibrates
from deploy_prune.pipeline.setup import check_names, local_data
from deploy_prune.recipe import Recipe
from deploy_prune.recovery.options import EPOCHS

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.sources import SourceInfo


@dataclass(frozen=True)
class Outlook:
    """What a run would do. `fetch` is what it would download; `missing` must be mended before it can start."""

    recipe: str
    out: str
    model: str
    sites: list[str]
    data: list[str]
    members: list[str]
    stages: list[str]
    fetch: list[str]
    missing: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """The outlook as lines for a person."""
        lines = [f"recipe {self.recipe} -> {self.out}", f"model: {self.model}"]
        lines += [f"  {line}" for line in self.sites]
        lines += [f"data: {line}" for line in self.data]
        lines.append(f"members: {', '.join(['dense', *self.members])}")
        lines += [f"{number}. {stage}" for number, stage in enumerate(self.stages, start=1)]
        lines += [f"would fetch: {line}" for line in self.fetch]
        return "\n".join(lines)

    def raise_for_missing(self) -> None:
        """Raise UnavailableError when the run could not start."""
        if self.missing:
            raise UnavailableError(
                "this recipe cannot run here yet",
                problems=self.missing,
                remedy="`deploy-prune doctor` says what is installed; --set changes a location.",
            )


def dry_run(recipe: Recipe, out: Path) -> Outlook:
    """Look ahead without writing or downloading anything. Raises UsageError for unknown names and for what does not go
    together."""
    from converters.precision.formats import check_steps, check_timed
    from deploy_prune.sources import describe_source

    check_names(recipe)
    check_cache(recipe)
    if recipe.bench.enabled and recipe.bench.past:
        check_steps(recipe.bench.runtimes)
    if recipe.family.budget in MEASURED:
        timed = recipe.family.latency
        check_timed(timed.runtime, timed.precision, timed.past is not None)
    fetch: list[str] = []
    missing: list[str] = []
    source = describe_source(recipe.model)
    if not source.exists:
        hub = source.location.startswith("hub:")
        (fetch if hub else missing).append(f"model {source.location}")
    data = []
    for role, reference in (("calibration", recipe.task.calibration), ("evaluation", recipe.task.evaluation)):
        if reference is None:
            data.append(f"{role}: none, quality is not measured")
            continue
        location, exists = local_data(reference)
        data.append(f"{role}: {reference}")
        if exists is None:
            fetch.append(f"{role} data {location}, unless it is in the local cache")
        elif not exists:
            missing.append(f"{role} data {location}")
    model = None if source.runs_user_code else _shell(recipe, source)
    if model is not None:
        check_model(recipe, model)
    missing += _absent_runtimes(recipe) + _absent_device(recipe)
    members = recipe.family.member_names()
    return Outlook(
        recipe.name,
        str(out),
        _said(source),
        _sites(model, source),
        data,
        members,
        _stages(recipe, members),
        fetch,
        missing,
    )


def _stages(recipe: Recipe, members: Sequence[str]) -> list[str]:
    search = recipe.search
    examples = "all" if search.examples is None else str(search.examples)
    stages = [
        f"delta: {recipe.diff.fit}, {recipe.diff.share:.2%} of the values, before the search"
    ] * recipe.diff.enabled
    stages += [f"search: {search.method} on {examples} calibration examples, {search.precision}"]
    if recipe.refit.enabled:
        stages.append(f"moments: of {recipe.refit.examples or 'all'} calibration examples, for the refit")
    if calibrates(recipe):
        stages.append("calibrated path: losses of four plans of each unit kind, and the kinds ordered by them")
    if recipe.family.budget in MEASURED:
        place = recipe.family.latency
        at = f"batch {place.batch}" + (f", sequence {place.seq}" if place.seq else "")
        at += f", decoders with {place.past} tokens in the cache" if place.past is not None else ""
        at += f", {place.precision}" if place.precision != "fp32" else ""
        stages.append(f"latency: table of the sites on {place.runtime}, {at}; losses along the path; plans, measured")
    cut = "plan, refit, cut" if recipe.refit.enabled else "plan, cut"
    export = "export with and without a cache" if recipe.export.cache else "export"
    stages.append(f"dense: {export}, parity, quality")
    if recipe.recover.enabled:
        cut += f", parity, quality, recover ({_recovery(recipe)})"
    if recipe.dynamic.enabled:
        cut = f"plan, refit, train with changing structure ({_dynamic(recipe)}), cut, parity, quality"
    stages.append(f"each of {len(members)} members: {cut}, {export}, parity, quality")
    if recipe.precision.also:
        also = ", ".join(recipe.precision.also)
        stages.append(f"each model also in {also}: parity with its fp32 file, agreement of predictions, quality")
    if recipe.bench.enabled:
        bench = recipe.bench
        cells = f"batch {', '.join(map(str, bench.batch))}"
        cells += f"; sequence {', '.join(map(str, bench.seq))}" if bench.seq else ""
        if past := [str(count) for count in bench.past or () if count]:
            cells += f"; one new token on caches of {', '.join(past)}"
        if 0 in (bench.past or ()):
            cells += "; prompts to decoders"
        stages.append(f"bench: {', '.join(bench.runtimes)}; {cells}; {bench.seconds:g} s for each model and cell")
    stages.append("bundle: assemble, then rename into place")
    return stages


def _recovery(recipe: Recipe) -> str:
    how = recipe.recover
    length = f"{how.steps} steps" if how.steps else f"{how.epochs or EPOCHS:g} epochs"
    named = {"full": "all weights", "lora": f"adapters of rank {how.rank}", "diff": f"a delta of {how.share:.2%}"}
    weights = named[how.method]
    start = "the recovered next larger member" if how.progressive else "the dense model's weights"
    return f"{weights}, {length} of batches of {how.batch_size}, from {start}"


def _dynamic(recipe: Recipe) -> str:
    how = recipe.dynamic
    length = f"{how.steps} steps" if how.steps else f"{how.epochs or EPOCHS:g} epochs"
    weights = "all weights" if how.method == "full" else f"adapters of rank {how.rank}"
    every = f"every {how.every} steps" if how.every else f"{UPDATES} times"
    return f"{weights}, {length} of batches of {how.batch_size}; {every} at most {how.drop:.0%} are exchanged"


def _said(source: SourceInfo) -> str:
    text = f"{source.reference} ({source.location})" if source.location not in source.reference else source.reference
    return text + (", which runs its own Python code" if source.runs_user_code else "")


def _sites(model: nn.Module | None, source: SourceInfo) -> list[str]:
    """The prunable groups, where the model's shape can be had without a download and without running user code."""
    from deploy_prune.adapters import adapter_for
    from deploy_prune.budget import count_params
    from deploy_prune.units import groups

    if source.runs_user_code:
        return ["sites: known when the model is loaded; a dry run does not run its code"]
    if model is None:
        return ["sites: known when the model is here"]
    adapter = adapter_for(model)
    sites = adapter.sites(model)
    lines = [f"{adapter.name}, {count_params(model):,} parameters, {len(sites)} sites"]
    found = groups(sites, None)
    for kind in dict.fromkeys(kind for _, kind in found):
        counts = [site.counts[kind] for site, k in found if k is kind]
        each = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        lines.append(f"{sum(counts):,} units of kind {kind.value} ({len(counts)} sites with {each})")
    return lines


def _shell(recipe: Recipe, source: SourceInfo) -> nn.Module | None:
    """The model, or its architecture with random weights when that is enough and the weights are not here."""
    from deploy_prune.references import model_reference
    from deploy_prune.sources import load_model

    if source.exists and source.kind == "gguf":
        return _shell_of_gguf(Path(source.location))
    if source.exists:
        return load_model(recipe.model)
    if source.kind == "timm":
        reference = model_reference(recipe.model)
        return load_model(f"timm:{reference.location}", pretrained=False, **reference.arguments)
    return None


def _shell_of_gguf(file: Path) -> nn.Module:
    """The architecture that a GGUF file's header describes, without weights: dequantising them takes a minute."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _absent_runtimes(recipe: Recipe) -> list[str]:
    from bench.runtimes import get_runtime

    absent = []
    wanted = list(recipe.bench.runtimes) if recipe.bench.enabled else ["ort-cpu"]
    if recipe.family.budget in MEASURED:
        wanted.append(recipe.family.latency.runtime)
    for name in dict.fromkeys(wanted):
        try:
            get_runtime(name)
        except DeployPruneError as error:
            absent.append(f"runtime {name}: {error.got or error.what}" + (f" ({error.remedy})" if error.remedy else ""))
    return absent


def _absent_device(recipe: Recipe) -> list[str]:
    from deploy_prune.pipeline.setup import choose_device

    try:
        choose_device(recipe.device)
    except UnavailableError as error:
        return [f"device {recipe.device}: {error.what}"]
    return []
