"""`deploy-prune delta`: what is done with a task delta once it has been learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy_prune.cli import console
from deploy_prune.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.delta import TaskDelta
    from deploy_prune.tasks import Task

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(short_help="Apply, subtract, inspect or export a task delta.")
def command() -> None:
    """What a task changes of a base model, in a file of its own (`deploy-prune diff` makes one)."""


@command.command("inspect")
@click.argument("file", metavar="DELTA", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, as_json: bool) -> None:
    """What DELTA changes, and how it was made."""
    from deploy_prune.delta import TaskDelta

    delta = TaskDelta.load(file)
    report = described(delta)
    if as_json:
        console.emit_json(report)
        return
    rows = report.pop("tensors")
    console.facts({name: value for name, value in report.items() if value is not None})
    print()
    console.table(["tensor", "of", "changed"], [[r["tensor"], r["of"], r["changed"]] for r in rows])


@command.command("apply")
@click.argument("file", metavar="DELTA", type=_FILE)
@click.option("--model", help="Reference of the base, where it is not the delta's own; its weights must be the same.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory, or FILE.safetensors")
def apply(file: Path, model: str | None, output: Path) -> None:
    """Write the task's whole model: for transformers a directory that `from_pretrained` loads, else safetensors."""
    from deploy_prune.delta import TaskDelta

    delta = TaskDelta.load(file)
    reference = model or reference_of(delta, file)
    base = base_of(reference)
    save_whole(delta.apply(base), reference, output)
    console.note(f"wrote {output}: {delta.count} values changed, head of {len(delta.head)} tensors")


@command.command("subtract")
@click.argument("file", metavar="DELTA", type=_FILE)
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory, or FILE.safetensors")
def subtract(file: Path, model: str, output: Path) -> None:
    """Write the base again, bit for bit, from the task's MODEL; the head stays the task's."""
    from deploy_prune.delta import TaskDelta

    delta = TaskDelta.load(file)
    save_whole(delta.subtract(base_of(model)), model, output)
    console.note(f"wrote {output}: {delta.count} values put back")


@command.command("export")
@click.argument("file", metavar="DELTA", type=_FILE)
@click.option("--model", help="Reference of the base, where it is not the delta's own; its weights must be the same.")
@click.option("--data", help="Data of the task, where the delta's own has moved; one example tells what goes in.")
@click.option("--base", "as_base", is_flag=True, help="Write the base's ONNX file instead, for --onto.")
@click.option("--onto", type=_FILE, help="The base's ONNX file: prove the delta on it; with -o, make TASK.onnx of it.")
@click.option("-o", "--output", type=_FILE, help="TASK.onnx")
@click.option("--json", "as_json", is_flag=True, help="Print the export's and the parity's figures as JSON.")
def export(
    file: Path,
    model: str | None,
    data: str | None,
    as_base: bool,
    onto: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Write the task's ONNX file, proved equal to torch, or nothing. With --onto BASE.onnx alone, prove that the base's
    file with the delta put in at load time is the task's model, so that of every task only the delta is stored; with -o
    too, write the file with the delta in it, without tracing the model again.
    """
    from converters.delta_onnx import task_session, write_task
    from converters.onnx_export import export_onnx
    from converters.parity import check_parity
    from deploy_prune.delta import TaskDelta
    from deploy_prune.files import atomic_siblings

    if (onto is None and output is None) or (as_base and (onto or output is None)):
        raise UsageError(
            "nothing to write or to prove",
            expected="-o TASK.onnx, -o BASE.onnx --base, or --onto BASE.onnx with or without -o",
            remedy="deploy-prune delta export --help",
        )
    delta = TaskDelta.load(file)
    reference = model or reference_of(delta, file)
    base = base_of(reference)
    task = task_of(delta, base, reference, data)
    made = base if as_base else delta.apply(base)
    report: dict[str, Any] = {"delta": str(file)}

    def prove(form: Any) -> None:
        report["parity"] = check_parity({"task": made, "onnx": form}, task.signature).to_json()

    if output is None:
        assert onto is not None
        session = task_session(onto, delta)

        def at_load_time(inputs: Any) -> Any:
            import torch

            return torch.from_numpy(session.run({name: tensor.numpy() for name, tensor in inputs.items()}))

        prove(at_load_time)
    else:
        with atomic_siblings(output) as temporary:
            if onto is None:
                meta = {} if as_base else {"deploy_prune.delta": file.name}
                report["export"] = export_onnx(made, temporary, task.signature, metadata=meta).to_json()
            else:
                write_task(onto, delta, temporary)
            prove(temporary)
    if as_json:
        console.emit_json(report)
    else:
        console.note(f"{output or onto}: equal to torch, largest relative error {report['parity']['error']:.1e}")


def described(delta: TaskDelta) -> dict[str, Any]:
    """Everything a delta says of itself, as plain data."""
    import numpy as np

    return {
        "type": "task delta",
        "base_sha256": delta.base_sha256,
        "result_sha256": delta.result_sha256,
        "values changed": delta.count,
        "bytes": delta.sizes(),
        "head": ", ".join(delta.head) or None,
        "facts": dict(delta.facts),
        "tensors": [
            {"tensor": name, "of": int(np.prod(c.shape)), "changed": len(c.positions)}
            for name, c in delta.changes.items()
        ],
    }


def reference_of(delta: TaskDelta, file: Path) -> str:
    """The base's reference. Raises UsageError for a delta that does not say."""
    reference = delta.facts.get("model")
    if not isinstance(reference, str):
        raise UsageError("the delta does not say what its base is", where=str(file), remedy="Name it with --model.")
    return reference


def base_of(reference: str) -> nn.Module:
    from deploy_prune.sources import load_model

    return load_model(reference)


def task_of(delta: TaskDelta, model: nn.Module, reference: str, data: str | None) -> Task:
    """The task as the delta was learned for it, on `data` in place of its own. Raises UsageError for a delta that does
    not say."""
    from deploy_prune.tasks import load_task

    how = delta.facts.get("task")
    if not isinstance(how, dict) or not {"name", "data", "options"} <= how.keys():
        raise UsageError("the delta does not say what task it is for", remedy="Export it from Python: dp.export_onnx.")
    return load_task(how["name"], model=model, model_ref=reference, calibration=data or how["data"], **how["options"])


def save_whole(model: nn.Module, reference: str, output: Path) -> None:
    """Weights as others load them: a transformers directory with its tokenizer, or one safetensors file."""
    from safetensors.torch import save_file

    from converters.checkpoint import own_tensors
    from deploy_prune.files import atomic_dir, atomic_file

    if hasattr(model, "save_pretrained") and output.suffix != ".safetensors":
        from deploy_prune.sources import load_tokenizer

        hf: Any = model
        with atomic_dir(output) as room:
            hf.save_pretrained(room)
            load_tokenizer(reference).save_pretrained(room)
        return
    if output.suffix != ".safetensors":
        raise UsageError("this model is saved as one file", got=str(output), expected="FILE.safetensors")
    with atomic_file(output) as temporary:
        save_file(own_tensors(model), temporary, metadata={"format": "pt"})
