"""What a step of the SPP search costs against a plain forward and backward pass with frozen weights.

    python -m bench.studies.step_cost --out bench/results/step_cost.json

Random weights serve: the time of a step does not depend on them. Both kinds of step run interleaved in one process on
the same batches; the figure is the ratio of medians with a bootstrap interval.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.methods.base import Context
    from deploy_prune.signature import Signature
    from deploy_prune.tasks.base import Batch
    from deploy_prune.units import Site

MODELS = ("vit-tiny", "distilbert", "smollm2")


@click.command(help=__doc__)
@click.option("--model", "models", type=click.Choice(MODELS), multiple=True, default=MODELS, show_default=True)
@click.option("--steps", default=20, show_default=True, help="Timed steps of each kind.")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(models: tuple[str, ...], steps: int, precision: str, out: Path | None) -> None:
    from bench.environment import environment
    from deploy_prune.files import write_json

    rows = [measure(name, steps, precision) for name in models]
    for row in rows:
        click.echo(
            f"{row['model']:12} plain {row['plain_ms']:8.1f} ms   spp {row['spp_ms']:8.1f} ms   "
            f"ratio {row['ratio']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]   "
            f"gate state {row['state_bytes'] / 1e6:.2f} MB, weights {row['weight_bytes'] / 1e6:.1f} MB"
        )
    if out:
        write_json(out, {"rows": rows, "environment": environment()})


def measure(name: str, steps: int, precision: str) -> dict[str, Any]:
    """Milliseconds of a plain and of an SPP step on one model, and the ratio of their medians."""
    from bench.stats import ratio_of_medians
    from deploy_prune.adapters import find_sites
    from deploy_prune.budget import CostModel
    from deploy_prune.methods.base import Context
    from deploy_prune.methods.spp import SppOptions, SppSearch

    model, task = _build(name)
    model.requires_grad_(False)
    sites = find_sites(model)
    costs = CostModel.measure(model, sites, task.signature, next(task.calibration_batches([[0]])).inputs)
    context = Context(model, sites, costs, task, task.calibration_size, task.batch, precision, 0)  # type: ignore[arg-type]
    search = SppSearch(context, SppOptions(steps=10 * steps, objective="distill"))
    times: dict[str, list[float]] = {"plain": [], "spp": []}
    generator = np.random.default_rng(0)
    for round_ in range(steps + 3):
        batch = search.batches[round_ % len(search.batches)]
        whole = next(context.task.calibration_batches([batch]))
        reference = context.dense_output(whole) if search.objective == "distill" else None
        for kind in generator.permutation(["plain", "spp"]):
            start = time.perf_counter()
            if kind == "spp":
                search.step(batch)
            else:
                _plain_step(context, sites[0], whole, search.objective, reference)
            if round_ >= 3:  # the first rounds fill caches
                times[str(kind)].append(1e3 * (time.perf_counter() - start))
    ratio = ratio_of_medians(np.array(times["spp"])[:, None], np.array(times["plain"])[:, None], seed=0)
    return {
        "model": name,
        "precision": precision,
        "batch": task.batch,
        "steps": steps,
        "plain_ms": float(np.median(times["plain"])),
        "spp_ms": float(np.median(times["spp"])),
        "ratio": ratio.value,
        "interval": [ratio.low, ratio.high],
        "raw_ms": times,
        "state_bytes": search.lbi.state_bytes(),
        "weight_bytes": sum(4 * p.numel() for p in model.parameters()),
    }


def _plain_step(context: Context, first: Site, batch: Batch, objective: str, reference: Tensor | None) -> None:
    """Forward and backward through the whole frozen model: the gradient goes down to the first site's input."""
    import torch

    layer = context.model.get_submodule(first.axes()[0][0])
    inputs: list[Tensor] = []

    def want_gradient(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0].detach().requires_grad_(True))
        return (inputs[0],)

    handle = layer.register_forward_pre_hook(want_gradient)
    try:
        output = context.output(batch)
        if objective == "distill":
            assert reference is not None
            losses = context.task.distance(output, reference, batch)
        else:
            losses = context.task.loss(output, batch)
        torch.autograd.grad(losses.mean(), inputs)
    finally:
        handle.remove()


class RandomTask:
    """Random inputs and labels of a model's own shapes."""

    def __init__(self, name: str, signature: Signature, batch: int, sequence: int, classes: int) -> None:
        self.name, self.signature, self.batch, self.sequence, self.classes = name, signature, batch, sequence, classes
        self.calibration_size = 4 * batch

    def calibration_items(self, limit: int | None = None) -> list[int]:
        return list(range(limit or self.calibration_size))

    def calibration_order(self, items: Sequence[int], batch_size: int, seed: int = 0) -> list[list[int]]:
        return [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]

    def calibration_batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        import torch

        from deploy_prune.tasks.base import Batch

        for items in order:
            inputs = self.signature.random_inputs({"batch": len(items), "sequence": self.sequence}, seed=items[0])
            shape = (len(items), self.sequence) if self.name == "causal-lm" else (len(items),)
            yield Batch(inputs, torch.randint(0, self.classes, shape), tuple(items))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        from torch.nn.functional import cross_entropy

        assert batch.target is not None
        losses = cross_entropy(output.flatten(0, -2), batch.target.flatten(), reduction="none")
        return losses.view(len(batch), -1).mean(1)

    def distance(self, output: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        from torch.nn.functional import kl_div, log_softmax

        return kl_div(log_softmax(output, -1), log_softmax(reference, -1), log_target=True, reduction="none").sum(-1)


def text_signature(output: tuple[str | int, ...], *, high: int = 30000) -> Signature:
    """Token ids below `high` and a mask, to logits."""
    from deploy_prune.signature import Signature, TensorSpec

    ids, mask = (
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "ids", high=high),
        TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
    )
    return Signature((ids, mask), TensorSpec("logits", "float32", output), lambda model, x: model(**x).logits)


def _build(name: str) -> tuple[nn.Module, RandomTask]:
    from deploy_prune.signature import Signature, TensorSpec

    if name == "vit-tiny":
        import timm

        pixels = TensorSpec("pixel_values", "float32", ("batch", 3, 224, 224))
        logits = TensorSpec("logits", "float32", ("batch", 1000))
        signature = Signature((pixels,), logits, lambda model, x: model(x["pixel_values"]))
        return (
            timm.create_model("vit_tiny_patch16_224").eval(),
            RandomTask("image-classification", signature, 16, 0, 1000),
        )
    import transformers

    if name == "distilbert":
        small = transformers.DistilBertConfig(dim=384, n_layers=6, n_heads=12, hidden_dim=1536, num_labels=2)
        model = transformers.DistilBertForSequenceClassification(small).eval()
        return model, RandomTask("text-classification", text_signature(("batch", 2)), 32, 64, 2)
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return model, RandomTask("causal-lm", text_signature(("batch", "sequence", 49152)), 4, 256, 49152)


if __name__ == "__main__":
    main()
