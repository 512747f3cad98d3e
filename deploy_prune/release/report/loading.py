"""How to load a member, in the words of each language: shown in the report and the model card."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy_prune.release.manifest import Manifest, TensorEntry

MEMBER = "MEMBER"  # stands for the member's name
_NUMPY = {"float32": "np.float32", "int64": "np.int64"}
_CPP = {"float32": "float", "int64": "int64_t"}


def loading(manifest: Manifest) -> dict[str, str]:
    """Language -> code that loads `models/MEMBER.onnx` and calls it once."""
    return {"Python": _python(manifest), "C++": _cpp(manifest), "Triton": _triton(manifest)}


def _sizes(entry: TensorEntry) -> list[int]:
    """A small concrete shape: one example, 16 tokens."""
    return [dim if isinstance(dim, int) else 1 if dim == "batch" else 16 for dim in entry.shape]


def _python(manifest: Manifest) -> str:
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("models/{MEMBER}.onnx")',
    ]
    lines.append("inputs = {")
    for entry in manifest.inputs:
        make = "ones" if entry.role == "mask" else "zeros"
        lines.append(f'    "{entry.name}": np.{make}({_sizes(entry)}, {_NUMPY[entry.dtype]}),')
    shown = " x ".join(map(str, manifest.output.shape))
    return "\n".join([*lines, "}", f"({manifest.output.name},) = session.run(None, inputs)  # {shown}", ""])


def _cpp(manifest: Manifest) -> str:
    lines = [
        "#include <onnxruntime_cxx_api.h>",
        "#include <vector>",
        "",
        "int main() {",
        '  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "deploy-prune");',
        f'  Ort::Session session(env, ORT_TSTR("models/{MEMBER}.onnx"), Ort::SessionOptions{{}});',
        "  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);",
        "  std::vector<Ort::Value> inputs;",
    ]
    for i, entry in enumerate(manifest.inputs):
        sizes, kind = _sizes(entry), _CPP[entry.dtype]
        count, shape = 1, ", ".join(map(str, sizes))
        for size in sizes:
            count *= size
        lines += [
            f"  std::vector<{kind}> data{i}({count}, {1 if entry.role == 'mask' else 0});",
            f"  std::vector<int64_t> shape{i}{{{shape}}};",
            f"  inputs.push_back(Ort::Value::CreateTensor<{kind}>(memory, data{i}.data(), data{i}.size(), "
            f"shape{i}.data(), shape{i}.size()));",
        ]
    names = ", ".join(f'"{entry.name}"' for entry in manifest.inputs)
    return "\n".join([
        *lines,
        f"  const char* names[] = {{{names}}};",
        f'  const char* outputs[] = {{"{manifest.output.name}"}};',
        "  auto found = session.Run(Ort::RunOptions{nullptr}, names, inputs.data(), inputs.size(), outputs, 1);",
        f"  const {_CPP[manifest.output.dtype]}* answer = found[0].GetTensorData<{_CPP[manifest.output.dtype]}>();",
        "  (void)answer;",
        "}",
        "",
    ])  # fmt: skip


def _triton(manifest: Manifest) -> str:
    lines = [
        "# deploy-prune triton BUNDLE -o repository",
        "# docker run -p 8000:8000 -v ./repository:/models nvcr.io/nvidia/tritonserver:YY.MM-py3 \\",
        "#   tritonserver --model-repository=/models",
        "import numpy as np",
        "import tritonclient.http as triton",
        "",
        'client = triton.InferenceServerClient("localhost:8000")',
        "inputs = []",
    ]
    for entry in manifest.inputs:
        make = "ones" if entry.role == "mask" else "zeros"
        kind = {"float32": "FP32", "int64": "INT64"}[entry.dtype]
        lines += [
            f'inputs.append(triton.InferInput("{entry.name}", {_sizes(entry)}, "{kind}"))',
            f"inputs[-1].set_data_from_numpy(np.{make}({_sizes(entry)}, {_NUMPY[entry.dtype]}))",
        ]
    return "\n".join([*lines, f'answer = client.infer("{MEMBER}", inputs).as_numpy("{manifest.output.name}")', ""])
