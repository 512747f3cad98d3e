"""What a search of a 7B model costs in time and memory: computed from steps measured on small models; and, on a GPU
that holds it, run (`search_7b`, a check of the GPU suite).

    python -m bench.studies.scale --out bench/results/scale.json

A step's work is counted as 4 FLOPs per weight and token: 2 forward, 2 for the gradient of activations (weights are
frozen). The rate at which this machine does that is measured; a 7B model of Llama's shape is laid out on torch's meta
device, without memory, to count its units and what a backward pass keeps.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor, nn

GPU_PEAK = 989e12  # dense bf16 FLOP/s of an H100 SXM by its data sheet
GPU_SHARE = 0.4  # of the peak, assumed
STEPS, BATCH, LENGTH, CURVATURE = 60, 16, 512, 256  # the search's defaults, on windows of 512 tokens
LLAMA_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32}  # fmt: skip
MEASURED = {"vit-tiny": 197, "smollm2": 256}  # tokens per row in the step cost study


@click.command(help=__doc__)
@click.option("--steps", default=5, show_default=True, help="Timed steps per model.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(steps: int, out: Path | None) -> None:
    from bench.environment import environment
    from deploy_prune.files import write_json

    measured = [rate(name, steps) for name in MEASURED]
    computed = costs_of_7b()
    step = computed["flops_per_step"]
    computed["hours_on_this_machine"] = computed["flops"] / measured[-1]["flops_per_second"] / 3600
    computed["minutes_on_assumed_gpu"] = computed["flops"] / (GPU_PEAK * GPU_SHARE) / 60
    for row in measured:
        click.echo(
            f"measured  {row['model']:10} {row['step_ms']:9.0f} ms a step, {row['flops_per_second'] / 1e9:.1f} GFLOP/s"
        )
    click.echo(f"computed  7B         {step / 1e12:9.0f} TFLOP a step, not run")
    for key, value in computed.items():
        click.echo(f"  {key:40} {value:.4g}")
    if out:
        write_json(out, {"measured": measured, "computed, not run": computed, "environment": environment()})


def rate(name: str, steps: int) -> dict[str, Any]:
    """The rate of an SPP step on a small model of the step cost study."""
    from bench.studies.step_cost import _build, measure

    model, task = _build(name)
    found = measure(name, steps, "bf16")
    work = 4 * multiplied(model) * task.batch * MEASURED[name]
    seconds = found["spp_ms"] / 1e3
    return {"model": name, "step_ms": found["spp_ms"], "flops": work, "flops_per_second": work / seconds}


def multiplied(model: nn.Module) -> int:
    """Weights that every token meets: all matrices but the embeddings that are looked up."""
    from torch import nn

    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def costs_of_7b() -> dict[str, float]:
    """Units, work and bytes of a search of Llama-2-7B's shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deploy_prune.adapters import find_sites
    from deploy_prune.layers import layer_at, width
    from deploy_prune.moment_groups import groups_within, moment_bytes

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B, attn_implementation="sdpa")).eval().requires_grad_(False)
    sites = find_sites(model)
    weights = sum(p.numel() for p in model.parameters())
    units = sum(site.units(kind) for site in sites for kind in site.counts)
    kept, inputs = activations(model)
    row = 4 * multiplied(model) * LENGTH
    passes = STEPS * BATCH + CURVATURE + BATCH * STEPS / 4  # the look at the data: a forward pass, half of a step's
    features = [width(layer_at(model, site.out), "in") for site in sites]
    return {
        "weights": weights,
        "units": units,
        "flops_per_step": row * BATCH,
        "flops": row * passes,
        "GB weights, fp32": 4 * weights / 1e9,
        "GB state of the inclusion": 6 * 4 * units / 1e9,
        "GB activations per row": kept / 1e9,
        "GB activations per row, recomputed": inputs / 1e9,
        "GB moments of all sites on disk": sum(8 * d * d for d in features) / 1e9,
        "GB moments of one site in memory": max(moment_bytes(model, site, weighted=True) for site in sites) / 1e9,
        "passes for moments within 8 GiB": len(groups_within(model, sites, 8 * 2**30, weighted=True)),
    }


def search_7b(device: str, *, small: bool = False) -> dict[str, Any]:
    """Run the iterated search (`objective=task`; no basis, stages or refit) on a model of Llama-2-7B's shape
    (`small`: a tiny one) with random weights on one device.

    Weights do not matter to time or memory. Returns seconds of the setting up, of all steps and of the median one, the
    work per second, and the most memory torch had allocated on the device at once.
    """
    import time

    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.studies.step_cost import RandomTask, text_signature
    from deploy_prune.adapters import find_sites
    from deploy_prune.budget import CostModel
    from deploy_prune.methods.base import Context
    from deploy_prune.methods.compute import Compute
    from deploy_prune.methods.spp import SppOptions, SppSearch

    tiny = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape = tiny | {"num_attention_heads": 4} if small else LLAMA_7B
    length, rows, steps = (16, 16, 10) if small else (LENGTH, CURVATURE, STEPS)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa", use_cache=False))
    model.eval().requires_grad_(False)
    signature = text_signature(("batch", "sequence", shape["vocab_size"]), high=shape["vocab_size"])
    task = RandomTask("causal-lm", signature, BATCH, length, shape["vocab_size"])
    task.calibration_size = rows
    sites = find_sites(model)
    example = {k: t.to(device) for k, t in signature.random_inputs({"batch": 1, "sequence": 16}, seed=0).items()}
    costs = CostModel.measure(model, sites, signature, example)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    built = time.perf_counter()
    compute = Compute(micro_batch=4)
    context = Context(model, sites, costs, task, rows, BATCH, "bf16", 0, compute=compute)  # type: ignore[arg-type]
    search = SppSearch(context, SppOptions(objective="task", steps=steps))
    synchronize()
    ready, taken = time.perf_counter(), []
    for number in range(steps):
        start = time.perf_counter()
        search.step(search.batches[number % len(search.batches)])
        synchronize()
        taken.append(time.perf_counter() - start)
    work = 4 * multiplied(model) * BATCH * length
    step = float(np.median(taken))
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "units": sum(site.units(kind) for site in sites for kind in site.counts),
        "rows": rows,
        "tokens per row": length,
        "rows per step": BATCH,
        "micro batch": compute.micro_batch,
        "seconds building": built - began,
        "seconds setting up": ready - built,
        "seconds of all steps": sum(taken),
        "seconds per step": step,
        "steps": steps,
        "FLOP per second": work / step,
        "peak bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def activations(model: Any) -> tuple[float, float]:
    """Bytes of one row of LENGTH tokens that a backward pass keeps, in fp32: of everything; of the blocks' inputs and
    one block. The logits count twice, for themselves and their loss."""
    import torch

    own = {id(p) for p in model.parameters()}
    alive: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        weight = id(tensor) in own or (tensor._base is not None and id(tensor._base) in own)
        if not weight:
            alive[id(tensor)] = tensor
        return tensor

    config = model.config
    start = torch.zeros(1, LENGTH, config.hidden_size, device="meta", requires_grad=True)
    places = torch.zeros(1, LENGTH, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model.layers[0](start, position_embeddings=model.model.rotary_emb(start, places))
    block = 4.0 * sum(tensor.numel() for tensor in alive.values())
    logits = 2 * 4.0 * LENGTH * config.vocab_size
    layers = config.num_hidden_layers
    return layers * block + logits, layers * 4 * LENGTH * config.hidden_size + block + logits


if __name__ == "__main__":
    main()
