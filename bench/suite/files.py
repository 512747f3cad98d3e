"""The ONNX files of the suite: one job per model and form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.suite.jobs import Jobs
from bench.suite.models import half_of, subjects

OPSET = 20
FORMS = ("ort", "standard", "plain")  # of the dense model; its half is exported as `ort` alone
PRECISIONS = {"dense": ("fp16",), "half": ("fp16", "bf16")}


class Files:
    """`files["vit-b", "half", "fp16"]` waits for that file; `align` is the multiple at which the halves are cut.

    A model's files lie as in a bundle, with a checkpoint of the half for the torch runtimes.
    """

    def __init__(self, jobs: Jobs, small: bool, align: int, directory: Path) -> None:
        self._jobs = jobs
        names = [subject.name for subject in subjects(small)]
        for name in reversed(names):  # the slowest first
            for form in ("half", *FORMS):
                folder = directory / name / "models"
                folder.mkdir(parents=True, exist_ok=True)
                jobs.start((name, form), make, small, align, name, form, folder)

    def __getitem__(self, key: tuple[str, str, str]) -> Path:
        """(model, "half" or a form of the dense one, precision). Raises what making it raised."""
        name, form, precision = key
        file: Path = self._jobs[name, form][precision]
        return file

    def members(self, name: str, precision: str = "fp32") -> dict[str, Path]:
        """The dense model and its half."""
        return {"dense": self[name, "ort", precision], "half": self[name, "half", precision]}


def make(small: bool, align: int, name: str, form: str, folder: Path) -> dict[str, Path]:
    """Write one model in one form, and in the precisions wanted of it; returns precision -> file."""
    from converters.checkpoint import save_pruned
    from converters.onnx_export import export_onnx

    subject = next(subject for subject in subjects(small) if subject.name == name)
    model: Any = subject.build()
    if form == "half":
        half = half_of(model, subject.signature, align)
        model = half.model
        save_pruned(model, half.plan, folder.parent / "checkpoints" / "half")
    file = folder / f"{'dense' if form == 'ort' else form}.onnx"
    variant: Any = "ort" if form == "half" else form
    export_onnx(model, file, subject.signature, opset=OPSET, variant=variant)
    made = {"fp32": file}
    for precision in PRECISIONS["half" if form == "half" else "dense"]:
        made[precision] = lowered(small, name, file, precision)
    return made


def lowered(small: bool, name: str, file: Path, precision: Any) -> Path:
    """`file` in another precision, beside it, proved against it on the CPU."""
    from converters.precision import LIMITS, convert_precision

    subject = next(subject for subject in subjects(small) if subject.name == name)
    inputs = subject.signature.random_inputs({"batch": 2, "sequence": 16}, seed=2)
    batch = {key: value.numpy() for key, value in inputs.items()}
    target = file.with_name(f"{file.stem}.{precision}.onnx")
    # Random weights predict by a hair's breadth, so predictions prove nothing here.
    limit = replace(LIMITS[precision], agreement=0.0)
    convert_precision(file, target, precision, [batch], mask=subject.mask, limit=limit)
    return target
