"""Stored inputs and outputs: what a model answered where it was made, so that it can be asked again anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_prune.errors import ArtifactError
from deploy_prune.files import atomic_file, existing

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from deploy_prune.signature import Signature

# Small, off the trace, one with padding: enough to notice a wrong file or runtime, little to ship.
SAMPLE_SIZES = ({"batch": 1, "sequence": 5}, {"batch": 3, "sequence": 8})


@dataclass(frozen=True)
class Sample:
    """One call: `inputs` by name, and the `output` of the torch model."""

    inputs: dict[str, np.ndarray]
    output: np.ndarray


def record_samples(
    path: Path | str,
    model: nn.Module,
    signature: Signature,
    *,
    seed: int = 0,
    sizes: Sequence[Mapping[str, int]] = SAMPLE_SIZES,
) -> None:
    """Ask `model` about made-up inputs and store question and answer as safetensors: `0/input/NAME`, `0/output`."""
    import torch

    device = next(model.parameters()).device

    def answer(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            output = signature.call(model, {name: torch.from_numpy(value).to(device) for name, value in inputs.items()})
        found: np.ndarray = output.float().cpu().numpy()
        return found

    record_answers(path, answer, signature, seed=seed, sizes=sizes)


def record_answers(
    path: Path | str,
    answer: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    signature: Signature,
    *,
    seed: int = 0,
    sizes: Sequence[Mapping[str, int]] = SAMPLE_SIZES,
) -> None:
    """As `record_samples`, of whatever answers: a file in another precision vouches for its own answers."""
    samples = []
    for i, size in enumerate(sizes):
        made_up = signature.random_inputs(size, seed=seed + i, padding=True)
        inputs = {name: value.numpy() for name, value in made_up.items()}
        samples.append(Sample(inputs, answer(inputs)))
    save_samples(path, samples)


def save_samples(path: Path | str, samples: Sequence[Sample]) -> None:
    """As `load_samples` reads them."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for i, sample in enumerate(samples):
        tensors |= {f"{i}/input/{name}": value for name, value in sample.inputs.items()}
        tensors[f"{i}/output"] = sample.output
    with atomic_file(path) as temporary:
        save_file(tensors, temporary)


def load_samples(path: Path | str) -> list[Sample]:
    """What `record_samples` stored; imports no torch. Raises UnavailableError or ArtifactError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = existing(path, "samples file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ArtifactError("samples are not valid safetensors", where=str(path), got=str(error)[:200]) from error
    samples: dict[str, Sample] = {}
    for key, value in sorted(tensors.items()):
        index, _, rest = key.partition("/")
        if f"{index}/output" not in tensors or not (rest == "output" or rest.startswith("input/")):
            raise ArtifactError(
                "samples file holds something else", where=str(path), got=key[:80], expected="N/input/NAME and N/output"
            )
        sample = samples.setdefault(index, Sample({}, tensors[f"{index}/output"]))
        if rest != "output":
            sample.inputs[rest.removeprefix("input/")] = value
    if not samples or not all(sample.inputs for sample in samples.values()):
        raise ArtifactError("samples file has no inputs", where=str(path))
    return list(samples.values())
