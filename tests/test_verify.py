"""Verify: a whole bundle passes without torch; a flipped byte, a foreign file or another answer does not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from shipped import SIGNATURES, bundle_of

from converters.onnx_export import export_onnx
from deploy_prune.errors import ArtifactError, ParityError, UnavailableError, UsageError
from deploy_prune.files import sha256_file
from deploy_prune.release.bundle import walk
from deploy_prune.release.manifest import FileEntry, Manifest
from deploy_prune.release.verify import verify

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bundle(tiny_vit, tmp_path):
    return bundle_of(tiny_vit, tmp_path)


def test_whole_bundle_passes(bundle):
    report = verify(bundle)
    assert [check.name for check in report.members] == ["dense", "s02"]
    assert all(check.error < 1e-5 and check.agreement == 1.0 and check.samples == 2 for check in report.members)
    assert report.files == len(list(walk(bundle)))
    assert report.manifest_sha256 == sha256_file(bundle / "manifest.json")


_NO_TORCH = """
import sys
sys.modules["torch"] = None  # importing it now fails
from deploy_prune.cli.main import run_command
code = run_command(["verify", sys.argv[1], "--json"])
assert sys.modules["torch"] is None
sys.exit(code)
"""


def test_command_verifies_in_a_process_without_torch(bundle):
    result = subprocess.run(
        [sys.executable, "-c", _NO_TORCH, str(bundle)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [member["name"] for member in json.loads(result.stdout)["members"]] == ["dense", "s02"]


def test_flipped_byte_in_any_file_is_caught(bundle):
    names = [name for name, _ in walk(bundle)]
    assert {
        "manifest.json",
        "README.md",
        "models/s02.onnx",
        "samples/dense.safetensors",
        "plans/s02.json",
        "checkpoints/s02/model.safetensors",
        "checkpoints/s02/checkpoint.json",
    } <= set(names)
    chance = random.Random(0)
    for name in names:
        path = bundle / name
        whole = path.read_bytes()
        for _ in range(20 if name == "manifest.json" else 1):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError) as caught:
                verify(bundle)
            assert name in str(caught.value)
            assert caught.value.exit_code == 4
        path.write_bytes(whole)
    verify(bundle)


def test_missing_foreign_truncated_and_linked_files_are_listed_at_once(bundle, tmp_path):
    (bundle / "plans/s02.json").unlink()
    (bundle / "extra.txt").write_text("x")
    (bundle / "models/dense.onnx").write_bytes(b"short")
    (bundle / "README.md").unlink()
    (tmp_path / "outside").write_text("x")
    (bundle / "README.md").symlink_to(tmp_path / "outside")
    (tmp_path / "folder").mkdir()
    (bundle / "linked").symlink_to(tmp_path / "folder")
    os.mkfifo(bundle / "pipe")
    with pytest.raises(ArtifactError) as caught:
        verify(bundle)
    assert sorted(problem.split(",")[0] for problem in caught.value.problems) == [
        "README.md: is a symbolic link; a bundle holds plain files",
        "extra.txt: is not in the manifest",
        "linked: is a symbolic link; a bundle holds plain files",
        "models/dense.onnx: has 5 bytes",
        "pipe: is not a plain file",
        "plans/s02.json: is missing",
    ]


def rehash(bundle, change=lambda manifest: {}, **members):
    """Write the manifest anew over changed files, as an honest builder of a wrong bundle would have."""
    manifest = Manifest.load(bundle / "manifest.json")
    files = {
        name: FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)
        for name, path in walk(bundle)
        if name != "manifest.json"
    }
    updated = [
        m.model_copy(update={"sha256": files[m.file].sha256, "bytes": files[m.file].bytes, **members.get(m.name, {})})
        for m in manifest.members
    ]
    manifest.model_copy(update={"files": files, "members": updated, **change(manifest)}).save(bundle / "manifest.json")


def reweighted(path, change):
    proto = onnx.load(path)
    initializer = next(i for i in proto.graph.initializer if i.name == "head.weight")
    initializer.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(initializer)), initializer.name))
    onnx.save(proto, path)


def test_model_that_answers_otherwise_fails_parity_with_exit_1(bundle):
    reweighted(bundle / "models/s02.onnx", lambda weight: weight * np.float32(1.01))
    rehash(bundle)
    with pytest.raises(ParityError, match=r"s02: sample 0: error 9.*e-03, tolerance 1e-04") as caught:
        verify(bundle)
    assert caught.value.exit_code == 1
    assert len(caught.value.problems) == 2


def test_model_that_answers_nan_fails_parity(bundle):
    reweighted(bundle / "models/s02.onnx", lambda weight: weight * np.float32("nan"))
    rehash(bundle)
    with pytest.raises(ParityError, match=r"s02: sample 0: .* of the candidate are NaN"):
        verify(bundle)


def test_stored_inputs_the_model_cannot_take_fail(bundle):
    path = bundle / "samples/dense.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "1/input/images": tensors["1/input/images"][:, :2].copy()}, path)
    rehash(bundle)
    with pytest.raises(ParityError, match=r"dense: sample 1: .*images"):
        verify(bundle)


@pytest.mark.parametrize("location", ["../outside.data", "/etc/hostname", "other.data"])
def test_external_data_elsewhere_is_refused_unopened(bundle, location):
    path = bundle / "models/dense.onnx"
    proto = onnx.load(path)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(proto.SerializeToString())
    rehash(bundle)
    with pytest.raises(ArtifactError, match="external data"):
        verify(bundle)


def _elsewhere() -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    return tensor


def _in_function(proto):
    node = onnx.helper.make_node("Constant", [], ["y"], value=_elsewhere())
    proto.functions.append(onnx.helper.make_function("own", "F", [], ["y"], [node], proto.opset_import[:1]))


def _in_inner_graph(proto):
    inner = onnx.helper.make_graph([], "inner", [], [], initializer=[_elsewhere()])
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute("body", inner))


def _in_sparse_initializer(proto):
    proto.graph.sparse_initializer.add().values.CopyFrom(_elsewhere())


def _in_training_graph(proto):
    proto.training_info.add().algorithm.initializer.append(_elsewhere())


@pytest.mark.parametrize("hide", [_in_function, _in_inner_graph, _in_sparse_initializer, _in_training_graph])
def test_external_data_is_found_wherever_a_graph_may_hide_it(bundle, hide):
    path = bundle / "models/dense.onnx"
    proto = onnx.load(path)
    hide(proto)
    path.write_bytes(proto.SerializeToString())
    rehash(bundle)
    with pytest.raises(ArtifactError, match="reads external data: not a plain path"):
        verify(bundle)


def test_manifest_that_is_no_plain_file_is_refused_unread(bundle, tmp_path):
    manifest = bundle / "manifest.json"
    manifest.rename(tmp_path / "elsewhere.json")
    manifest.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ArtifactError, match="not a plain file"):
        verify(bundle)
    manifest.unlink()
    os.mkfifo(manifest)  # reading it would wait for ever
    with pytest.raises(ArtifactError, match="not a plain file"):
        verify(bundle)


def test_runtime_that_is_asked_for_answers_or_the_check_fails(bundle):
    assert {check.runtime for check in verify(bundle, runtimes=["ort-cpu"]).members} == {"ort-cpu"}
    with pytest.raises(UsageError, match="no runtime 'ort-cup'"):
        verify(bundle, runtimes=["ort-cup"])


def test_scores_that_do_not_give_the_stated_figure_are_refused(bundle):
    from figures import changed, judged

    changed(bundle, s02={**judged(bundle, "s02", [1.0, 0.0, 1.0, 1.0])})
    verify(bundle)
    quality = Manifest.load(bundle / "manifest.json").members[1].quality.model_copy(update={"value": 0.9})
    changed(bundle, s02={"quality": quality})
    with pytest.raises(ArtifactError, match=r"scores/s02.safetensors gives top1 0.75, the manifest says 0.9"):
        verify(bundle)


def test_graph_that_is_not_as_the_manifest_says_is_refused(bundle):
    path = bundle / "models/dense.onnx"
    proto = onnx.load(path)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    proto.graph.node[0].domain = "com.microsoft"
    proto.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(proto, path)
    rehash(bundle, dense={"opset": 19})
    with pytest.raises(ArtifactError) as caught:
        verify(bundle)
    text = str(caught.value)
    for words in (
        "the manifest says [('images', 'float32', ['batch', 3, 32, 32])]",
        "operators of com.microsoft",
        "not of opset 19",
    ):
        assert words in text


def test_operators_of_onnx_runtime_are_for_variant_ort_alone(bundle, tiny_vit):
    report = export_onnx(tiny_vit, bundle / "models/dense.onnx", SIGNATURES["tiny_vit"], opset=20, variant="ort")
    rehash(bundle, dense={"opset": 20, "variant": "ort"})
    assert verify(bundle).members[0].name == "dense" and report.variant == "ort"
    rehash(bundle, dense={"variant": "standard"})
    with pytest.raises(ArtifactError, match=r"operators of com.microsoft, which variant standard may not"):
        verify(bundle)


def test_file_that_is_not_onnx_is_refused(bundle):
    (bundle / "models/dense.onnx").write_bytes(b"no model at all" * 10)
    rehash(bundle)
    with pytest.raises(ArtifactError, match=r"dense: models/dense.onnx is not an ONNX file"):
        verify(bundle)


def test_plan_of_other_weights_or_other_figures_is_refused(bundle):
    def other(manifest):
        return {"base": manifest.base.model_copy(update={"weights_sha256": "0" * 64})}

    rehash(bundle, other, s02={"achieved": None})
    with pytest.raises(ArtifactError) as caught:
        verify(bundle)
    assert "plans/s02.json is for other weights" in str(caught.value)
    assert "asks or achieves something else" in str(caught.value)


def test_what_is_no_bundle_is_said_to_be_none(tmp_path):
    with pytest.raises(UnavailableError, match="no such bundle"):
        verify(tmp_path / "nothing")
    with pytest.raises(UnavailableError, match="no such manifest"):
        verify(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="not a bundle"):
        verify(tmp_path / "file")


def test_data_beside_the_graph_is_checked_as_the_graph_is(bundle):
    path = bundle / "models/dense.onnx"
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="dense.onnx.data", size_threshold=1024)
    data = path.with_name("dense.onnx.data")
    rehash(bundle, dense={"external": "models/dense.onnx.data", "bytes": path.stat().st_size + data.stat().st_size})
    verify(bundle)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"models/dense.onnx.data: has sha256"):
        verify(bundle)
