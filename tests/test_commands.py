"""Commands and Python examples of README and docs are executed, in reading order, in one directory.

What they name is stood in for by small things of the same kind (`Room.furnish`), and a few words are added that make
them quick (`QUICK`, `added`): nothing else is changed. `NOT_RUN` says what is never executed and why, `ELSEWHERE` which
test executes the same on a small model; DEPLOY_PRUNE_ALL_COMMANDS=1 (`make commands`, minutes) executes those here too.
That all of them are understood is tested in test_docs.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from clockwork import bytes_of, time_of
from commands import DOCS, README, blocks, commands

from deploy_prune.cli.main import run_command

ALL = bool(os.environ.get("DEPLOY_PRUNE_ALL_COMMANDS"))
# Start of a command -> why it is not executed here.
NOT_RUN = {
    "pip install": "installs packages; CI does it in a fresh environment",
    "make demo": "CI runs it; the demo itself: tests/end_to_end/test_demo_run.py",
    "accelerate launch": "needs 8 GPUs",
    "torchrun": "MODEL and ... stand for the reader's own; such a search runs in tests/test_distributed.py",
}
# ... -> the test that executes its like; every one of them is a whole run.
ELSEWHERE = {
    "deploy-prune run my.yaml --out": "tests/end_to_end/test_run.py",
    "deploy-prune run my.yaml --set": "tests/end_to_end/test_run.py, test_diff_run.py",
    "deploy-prune run digits-recover": "tests/end_to_end/test_recovery_run.py",
    "deploy-prune run vit-tiny-imagenet": "tests/end_to_end/test_recovery_run.py",
    "deploy-prune run minilm-sst2-diff": "tests/end_to_end/test_diff_run.py",
    "deploy-prune run distilbert-sst2": "tests/end_to_end/test_dynamic_run.py, tests/test_uniform.py",
    "deploy-prune inspect runs/distilbert": "tests/end_to_end/test_dynamic_run.py",
    "deploy-prune export path.safetensors --macs": "tests/end_to_end/test_run.py",
    "deploy-prune export path.safetensors --sparsity .5 -o runs/half": "tests/end_to_end/test_recovery_run.py",
    "deploy-prune export path.safetensors --speedup": "tests/end_to_end/test_run.py",
    "deploy-prune export path.safetensors --latency-ms": "tests/end_to_end/test_run.py",
    "deploy-prune export path.safetensors --sparsity .5 --variant": "tests/test_variant_choice.py",
    "deploy-prune export path.safetensors --sparsity .3 --precision": "tests/end_to_end/test_precision_run.py",
    "deploy-prune gate runs/small": "tests/end_to_end/test_precision_run.py",
    "deploy-prune reproduce": "tests/test_serving.py",
    "deploy-prune export clip": "tests/test_families_ship.py",
    "deploy-prune export deit": "tests/test_families_ship.py",
    "deploy-prune export path.safetensors --sparsity .1,.2 -o runs/lm": "tests/end_to_end/test_decoder_run.py",
    "deploy-prune export path.safetensors --sparsity .3,.5 -o runs/embedder": "tests/test_tasks_embedding.py",
    "deploy-prune export path.safetensors --sparsity .3,.5,.7": "tests/test_real_text.py",
    "deploy-prune run smollm2-wikitext": "tests/end_to_end/test_decoder_run.py",
    "deploy-prune bench runs/lm": "tests/end_to_end/test_decoder_run.py",
    "deploy-prune generate": "tests/end_to_end/test_decoder_run.py",
    "deploy-prune plan build": "tests/test_foreign_plans.py",
    "deploy-prune plot predicted": "tests/test_plots.py",
}
# One more word each: a tiny model in the place of a pretrained one of the same architecture.
TINY = "?img_size=32&patch_size=8&embed_dim=96&depth=2&num_heads=3&num_classes=4"
STAND_INS = {
    "timm:vit_tiny_patch16_224": f"timm:vit_tiny_patch16_224@tiny.safetensors{TINY}",
    "timm:deit_small_patch16_224": f"timm:deit_small_patch16_224@tiny.safetensors{TINY}",
}
SHORT = ("search.examples=16", "refit.examples=16", "quality.limit=16", "bench.seconds=0.02", "bench.batch=[1]",
         "parity.examples=2")  # fmt: skip
TRAINING = ("recover.epochs=1", "recover.examples=16", "recover.holdout=4")
DEMO = "model=python:deploy_prune.demo:digits_vit_untrained?depth=1"
QUICK = {
    "digits": (DEMO, "family.sparsities=[0.3]", "search.stages=[]"),
    "digits-recover": (DEMO, "family.sparsities=[0.5,0.7]", *TRAINING),
    "vit-tiny-imagenet": (f"model={STAND_INS['timm:vit_tiny_patch16_224']}", "task.calibration=imagefolder:train",
                          "task.evaluation=imagefolder:val", "family.sparsities=[0.3]", *TRAINING),
    "distilbert-sst2": ("family.sparsities=[0.3]", "bench.seq=[8]"),
    "distilbert-sst2-adaptive": ("bench.seq=[8]", "dynamic.examples=32", "dynamic.holdout=8", "dynamic.steps=6",
                                 "dynamic.every=2", "dynamic.evaluations=1", "dynamic.rank=2"),
    "minilm-sst2-diff": ("model=hf:ENCODER?new_head=2", "family.sparsities=[0.3]", "bench.seq=[8]", "diff.examples=32",
                         "diff.epochs=1", "diff.mask_epochs=1"),
    "my.yaml": (),
}  # fmt: skip
VERDICTS = ("gate", "compare")  # may say no: timings of so short a run say nothing
SHORTER = (
    ("examples=256", "examples=64"),
    ("epochs=3", "epochs=1"),
    ("steps=300", "steps=4"),
    ('fit="l0"', 'fit="bitfit"'),
)


def added(words: list[str]) -> list[str]:
    """What makes a command quick."""
    name, *rest = words
    if name == "run" and rest[0] in QUICK:
        settings: tuple[str, ...] = (*SHORT, *QUICK[rest[0]])
    elif name == "search":
        windows = ["--task-option", "length=16"] if "causal-lm" in rest else []  # as many tokens as the tiny one takes
        pooling = ["--task-option", "pooling=mean"] if "sentence-embedding" in rest else []  # the tiny one says none
        return ["--examples", "16", "--stages", "", *windows, *pooling]
    elif name == "export" or words[:2] == ["plan", "build"]:
        settings = (*SHORT[1:], *(TRAINING if "--recover" in rest else ()))
        if any(word in rest for word in ("--speedup", "--latency-ms")):
            settings += ("bench.enabled=false",)
    elif name == "diff":
        return ["--set", "epochs=1", "--set", "mask_epochs=1"]
    elif name == "bench":
        return ["--seconds", "0.02"]
    else:
        return []
    given = {word.partition("=")[0] for word in rest}
    return [part for s in settings if s.partition("=")[0] not in given for part in ("--set", s)]


class Room:
    """A directory with what README and docs name, where their commands run one after another."""

    def __init__(self, place: Path, models: dict[str, Any], save: Callable[[Any], Path]) -> None:
        self.place, self.done = place, set[str]()
        self.folders = {name: save(model) for name, model in models.items() if name != "tiny_vit"}
        self.furnish(models["tiny_vit"])

    def furnish(self, vit: Any) -> None:
        """Files of the names that README and docs use."""
        from PIL import Image
        from safetensors.torch import save_file

        save_file(vit.state_dict(), self.place / "tiny.safetensors")
        for part in ("train", "val"):
            for i in range(16):
                file = self.place / part / "wxyz"[i % 4] / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (8 * i, 255 - 8 * i, 40 * (i % 4))).save(file)
        lines = ["\t".join([f"w{i} w{i + 1} w{2 * i}"] * 2 + [str(i % 2)]) for i in range(48)]
        for folder in (self.place, self.place / "glue/SST-2"):
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("train.tsv", "dev.tsv"):
                (folder / name).write_text("\n".join(["text\tsentence\tlabel", *lines]) + "\n")
        for name in ("sts-train.tsv", "sts-dev.tsv"):
            rows = ("\t".join(["x", "x", "x", str(i), str(i % 5), f"w{i} w3", f"w{i} w{i % 7}"]) for i in range(32))
            (self.place / name).write_text("\n".join(rows) + "\n")
        for name in ("train.txt", "valid.txt"):
            (self.place / name).write_text(" ".join(f"w{i * i % 90}" for i in range(900)))
        for name in ("captions.csv", "test.csv"):
            rows = (f"{'wxyz'[i % 4]}/{i}.png,w{i} w{i % 4}" for i in range(16))
            (self.place / name).write_text("\n".join(["image,text", *rows]) + "\n")
        (self.place / "history.json").write_text('[["distilbert.transformer.layer.0.ffn.lin1", true, [3, 17]]]')
        (self.place / "models").mkdir()
        self.stand("distilbert", "models/distilbert_sst2")
        self.stand("bert", "ENCODER")
        side = json.loads((self.folders["clip"] / "config.json").read_text())["vision_config"]["image_size"]
        prepared = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.3] * 3,
                    "size": {"height": side, "width": side}, "do_center_crop": False}  # fmt: skip
        (self.folders["clip"] / "preprocessor_config.json").write_text(json.dumps(prepared))
        self.stand("clip", "CLIP_DIR")
        (self.place / "photos").symlink_to("train")

    def write_recipe(self, *, text: bool) -> None:
        """my.yaml: the reader's own recipe, for images or for texts."""
        digits = {"name": "image-classification", "calibration": "digits:train", "evaluation": "digits:test"}
        texts = {"name": "text-classification", "calibration": "tsv:train.tsv", "evaluation": "tsv:dev.tsv"}
        recipe = {
            "model": "python:deploy_prune.demo:digits_vit_untrained?depth=1",
            "task": texts if text else digits,
            "search": {"method": "magnitude"},
            "family": {"sparsities": [0.5]},
            "bench": {"seq": [8]} if text else {},
        }
        (self.place / "my.yaml").write_text(yaml.safe_dump(recipe))

    def stand(self, model: str, name: str) -> None:
        """Put a tiny model in the place of the folder `name`."""
        link = self.place / name
        link.unlink(missing_ok=True)
        link.symlink_to(self.folders[model])

    def run(self, line: str) -> None:
        """Execute a command as it stands, but for stand-ins and what makes it quick; each only once."""
        passed_over = tuple(NOT_RUN) if ALL else (*NOT_RUN, *ELSEWHERE)
        if line in self.done or line.startswith(passed_over):
            return
        self.done.add(line)
        if not line.startswith("deploy-prune "):
            subprocess.run(["bash", "-eo", "pipefail", "-c", line], cwd=self.place, check=True, capture_output=True)
            return
        line, _, output = line.partition(" > ")
        words = [STAND_INS.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()) as printed:
            code = run_command([*words, *added(words)])
        assert code == 0 or (code == 1 and words[0] in VERDICTS), f"{line}\nexit code {code}\n{said.getvalue()[-3000:]}"
        if output:
            Path(output).write_text(printed.getvalue())


@pytest.fixture
def room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: Callable[[Any], Path],
    tiny_distilbert: Any,
    tiny_bert: Any,
    tiny_llama: Any,
    tiny_clip: Any,
) -> Room:
    from conftest import randomize

    from deploy_prune.sources import load_model

    def four_times_as_slow(name: str, file: Path) -> float:
        return 4 * bytes_of(name, file)

    monkeypatch.setattr(
        "deploy_prune.latency.place.Place.time", lambda place, files, **options: time_of(files, four_times_as_slow)
    )
    place = tmp_path / "room"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("DEPLOY_PRUNE_DATA", str(place))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vit = randomize(load_model(f"timm:vit_tiny_patch16_224{TINY}&pretrained=false"))
    models = {"distilbert": tiny_distilbert, "bert": tiny_bert, "encoder": tiny_bert.bert, "llama": tiny_llama}
    return Room(place, {**models, "clip": tiny_clip, "tiny_vit": vit}, saved)


def lines(page: Path) -> Iterator[str]:
    yield from (re.sub(r"\s+", " ", line.partition(" #")[0]).strip() for line in commands(page))


GATE = next(block for block in blocks(README, "yaml") if "rules:" in block)


def prepared(room: Room, line: str) -> None:
    """What a line needs that no earlier line made."""
    if "my.yaml" in line:
        room.write_recipe(text="ENCODER" in line)
    if line.startswith("deploy-prune compare"):
        for name in ("old", "new"):
            shutil.copytree("runs/digits", f"runs/{name}", dirs_exist_ok=True)
    if line.startswith("deploy-prune triton"):  # shown twice, with other options
        shutil.rmtree("repository", ignore_errors=True)
    room.run(line)


@pytest.mark.timeout(1800)
def test_commands_of_the_readme_and_the_docs_do_what_they_say(room: Room) -> None:
    (room.place / "gate.yaml").write_text(GATE.replace("s4*", "s3*"))  # the family here has one member
    for line in lines(README):
        prepared(room, line)
    for page in DOCS:
        room.stand({"decoders": "llama", "embeddings": "encoder"}.get(page.stem, "distilbert"), "MODEL_DIR")
        for line in lines(page):
            prepared(room, line)
    assert {"digits.html", "pictures", "repository", "gate.xml", "task.onnx", "plan.json", "masks.npz"} <= {
        path.name for path in room.place.iterdir()
    }


@pytest.mark.timeout(600)
def test_python_of_the_readme_and_the_docs_runs_in_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "deploy_prune.latency.place.Place.time", lambda place, files, **options: time_of(files, bytes_of)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": np.zeros((8, 1, 8, 8), np.float32)}  # the reader's own
    done: set[str] = set()
    for page in (README, *DOCS):
        for code in blocks(page, "python"):
            if code in done:
                continue
            done.add(code)
            for long, short in SHORTER:
                code = code.replace(long, short)
            exec(compile(code, str(page), "exec"), names)
    again, dense = names["again"], names["model"]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (again, dense)]
    assert sizes[0] < 0.8 * sizes[1]
    assert (tmp_path / "small.onnx").stat().st_size > 4 * sizes[0]
    assert (tmp_path / "apart").is_dir() and names["session"] is not None


def test_every_reason_is_of_a_command_that_is_shown() -> None:
    shown = [line for page in (README, *DOCS) for line in lines(page)]
    for start in (*NOT_RUN, *ELSEWHERE):
        assert any(line.startswith(start) for line in shown), start
    for places in ELSEWHERE.values():
        for place in places.split(", "):
            assert any((README.parent / folder / place).is_file() for folder in ("", "tests/end_to_end")), place
