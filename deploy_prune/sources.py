"""Model references become live models: whole, finite, fp32, in eval mode, and knowing how to be built again.

    timm:NAME                      pretrained weights from the hub
    timm:NAME@FILE.safetensors     weights of a local file, in timm's key names
    hf:ID_OR_DIR                   a transformers model; its class is the one `config.json` names
    gguf:FILE                      a GGUF file, dequantised to fp32 once and kept in the cache
    python:module:function         what your own function returns: THIS RUNS YOUR CODE

A directory or file may be written `package:MODULE/relative/path` when an installed Python package carries it. Any
reference may end in `?name=value&...`, arguments of the model as JSON or plain text, and in `#sha256=HEX`, the
expected hash of its weights file. `hf:...?new_head=3` puts a fresh classification head of 3 classes, the same at every
load, on the encoder, for a task that is yet to be learned. `?delta=FILE` makes the model the task's that a task delta
was learned for, on the base that it names.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.architecture import Architecture, load_function
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError, did_you_mean
from deploy_prune.new_head import with_new_head
from deploy_prune.quiet import without_progress_bars
from deploy_prune.references import PACKAGE, Reference, existing_path, local_path, model_reference
from deploy_prune.weights import (
    check_finite,
    check_index,
    check_keys,
    check_safetensors,
    check_sha256,
    load_strictly,
    read_safetensors,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "1_Pooling/*")
_HUB_SKIP = ("onnx/*", "openvino/*", "original/*", "*/*.safetensors")
_OFFLINE_REMEDY = "Go online once to download it (and unset HF_HUB_OFFLINE), or name a local file or directory."


@dataclass(frozen=True)
class SourceInfo:
    """What loading a reference would touch; `exists` is false when it would download `location` from the hub."""

    reference: str
    kind: str
    location: str
    exists: bool
    runs_user_code: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_model(ref: str, *, dtype: torch.dtype | None = None, sha256: str | None = None, **arguments: Any) -> nn.Module:
    """The model a reference names, in eval mode, on the CPU, in `dtype` (float32 unless given).

    `arguments` override the reference's own and go to the model's builder. Raises UsageError for an unknown scheme,
    model or argument, UnavailableError for what is missing here, ArtifactError for damaged, unfitting or non-finite
    weights.
    """
    import torch

    reference = model_reference(ref)
    if sha256 is not None:
        reference = replace(reference, sha256=sha256.lower())
    arguments = {**reference.arguments, **arguments}
    delta = arguments.pop("delta", None)
    dtype = torch.float32 if dtype is None else dtype
    loaders = {"timm": _load_timm, "hf": _load_hf, "gguf": _load_gguf, "python": _load_python}
    model = loaders[reference.scheme](reference, arguments)
    model = model.to(dtype).eval()
    if delta is not None:
        from deploy_prune.delta import TaskDelta

        model = TaskDelta.load(existing_path(str(delta), "delta file")).apply(model)
    check_finite(model, ref)
    return model


def load_tokenizer(ref: str) -> Any:
    """The tokenizer that belongs to an `hf:` or `gguf:` model; pads on the right."""
    from transformers import AutoTokenizer

    folder = model_folder(ref)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(
            "no usable tokenizer",
            where=str(folder),
            got=str(error).splitlines()[0],
            remedy="The model folder needs tokenizer.json or its vocabulary files.",
        ) from error
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is always masked: any known id will do
    return tokenizer


def model_folder(ref: str) -> Path:
    """The local folder with config, weights and tokenizer of an `hf:` or `gguf:` reference; fetched if need be."""
    reference = model_reference(ref)
    if reference.scheme == "gguf":
        from deploy_prune.gguf import dequantised

        with without_progress_bars():
            return dequantised(existing_path(reference.location, "GGUF file"))
    if reference.scheme != "hf":
        raise UsageError(
            "this model comes without a folder of config and tokenizer",
            where=repr(ref),
            expected="an hf: or gguf: reference",
        )
    if _is_local(reference.location):
        folder = existing_path(reference.location, "model directory")
        if not (folder / "config.json").is_file():
            raise UnavailableError(
                "no config.json in the model directory",
                where=str(folder),
                remedy="An hf: directory holds config.json and model.safetensors.",
            )
        return folder
    return _fetch(reference.location)


def describe_source(ref: str) -> SourceInfo:
    """What `load_model` would read or download, found out without loading or importing anything of the model."""
    reference = model_reference(ref)
    delta = reference.options.get("delta")
    if delta is not None and not (path := local_path(delta)).is_file():
        return SourceInfo(ref, reference.scheme, str(path), exists=False)
    if reference.scheme == "python":
        found = _importable(reference.location)
        return SourceInfo(ref, "python", reference.location, exists=found, runs_user_code=True)
    if reference.scheme == "gguf":
        path = local_path(reference.location)
        return SourceInfo(ref, "gguf", str(path), exists=path.is_file())
    if reference.scheme == "timm" and reference.file is not None:
        path = local_path(reference.file)
        return SourceInfo(ref, "timm", str(path), exists=path.is_file())
    if reference.scheme == "timm":
        hub_id = _timm_hub_id(reference.location)
        return SourceInfo(ref, "timm", f"hub:{hub_id}", exists=_cached(hub_id, "model.safetensors"))
    if _is_local(reference.location):
        path = local_path(reference.location)
        return SourceInfo(ref, "hf", str(path), exists=(path / "config.json").is_file())
    return SourceInfo(ref, "hf", f"hub:{reference.location}", exists=_cached(reference.location, "config.json"))


def _load_timm(reference: Reference, arguments: dict[str, Any]) -> nn.Module:
    import timm

    _timm_hub_id(reference.location)
    pretrained = bool(arguments.pop("pretrained", reference.file is None))
    if reference.file is None:
        _no_file_to_hash(reference)
    else:
        pretrained = False
        file = existing_path(reference.file, "weights file")
        check_sha256(file, reference.sha256)
        tensors = read_safetensors(file)
    try:
        model = timm.create_model(reference.location, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise UsageError("timm does not take these arguments", where=reference.text, got=str(error)) from error
    except OSError as error:
        raise UnavailableError(
            "cannot download the pretrained weights",
            where=reference.text,
            got=str(error).splitlines()[0],
            remedy=_OFFLINE_REMEDY,
        ) from error
    except RuntimeError as error:
        raise UsageError(
            "timm cannot make this model",
            where=reference.text,
            got=str(error),
            remedy="Name a pretrained tag that timm lists, or pass a weights file with @FILE.",
        ) from error
    if reference.file is not None:
        load_strictly(model, tensors, str(file))
    Architecture("timm", reference.location, arguments).attach(model)
    return model


def _timm_hub_id(name: str) -> str:
    """The hub repository of a timm model's default weights. Raises UsageError for a model timm does not know."""
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        known = timm.list_models()
        import difflib

        close = difflib.get_close_matches(architecture, known, n=5, cutoff=0.6) or known[:5]
        raise UsageError(
            "timm has no such model",
            got=architecture,
            remedy=f"{did_you_mean(architecture, close)} All {len(known)}: timm.list_models()",
        )
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [tag.partition(".")[2] for tag in timm.list_pretrained(architecture)]
        raise UsageError(
            f"timm has no such weights of {architecture}",
            got=name.partition(".")[2],
            remedy=did_you_mean(name.partition(".")[2], tags),
        ) from error
    return str(config.hf_hub_id or name) if config else name


def _load_hf(reference: Reference, arguments: dict[str, Any]) -> nn.Module:
    folder = model_folder(reference.text)
    return _load_folder(folder, reference, arguments)


def _load_gguf(reference: Reference, arguments: dict[str, Any]) -> nn.Module:
    check_sha256(existing_path(reference.location, "GGUF file"), reference.sha256)
    return _load_folder(model_folder(reference.text), replace(reference, sha256=None), arguments)


def _load_folder(folder: Path, reference: Reference, arguments: dict[str, Any]) -> nn.Module:
    import torch

    if "trust_remote_code" in arguments:
        raise UsageError(
            "a reference cannot run code from the hub",
            where=reference.text,
            remedy="Write a function that loads the model and name it python:module:function.",
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnavailableError(
            "no safetensors weights in the model directory",
            where=str(folder),
            remedy="Pickled weights are not read; convert them with model.save_pretrained(directory).",
        )
    for file in files:
        check_safetensors(file)
    check_index(folder)
    if reference.sha256 is not None:
        if len(files) != 1:
            raise UsageError(
                "an expected sha256 needs a single weights file",
                where=str(folder),
                got=", ".join(file.name for file in files),
            )
        check_sha256(files[0], reference.sha256)
    embedder = (folder / "modules.json").is_file()  # a sentence-transformers folder ships the encoder alone
    classes = arguments.pop("new_head", None)
    if classes is not None:
        return with_new_head(folder, reference.text, classes, arguments)
    cls = _model_class(folder, embedder)
    if getattr(cls, "_supports_sdpa", True):
        arguments.setdefault("attn_implementation", "sdpa")
    try:
        with without_progress_bars():
            model, info = cls.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **arguments,
            )
    except TypeError as error:
        raise UsageError("transformers does not take these arguments", where=reference.text, got=str(error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            "transformers cannot load this model", where=str(folder), got=str(error).splitlines()[0]
        ) from error
    missing = set(info["missing_keys"])
    if embedder:
        missing -= _zero_pooler(model, missing)
    check_keys(
        str(folder),
        missing=missing,
        unexpected=() if embedder else info["unexpected_keys"],
        misshapen=[(k, tuple(got), tuple(want)) for k, got, want in info["mismatched_keys"]],
    )
    return model


def _model_class(folder: Path, embedder: bool) -> Any:
    import transformers

    if embedder:
        return transformers.AutoModel
    try:
        names = transformers.AutoConfig.from_pretrained(folder).architectures or []
    except (ValueError, KeyError, OSError) as error:
        raise ArtifactError(
            "transformers does not understand config.json",
            where=str(folder),
            got=str(error).splitlines()[0],
            remedy="Install a transformers version that knows this model type.",
        ) from error
    cls = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UsageError(
            "config.json does not name one transformers model class",
            where=str(folder / "config.json"),
            expected='"architectures": ["SomeModelClass"]',
            got=repr(names),
        )
    return cls


def _zero_pooler(model: nn.Module, missing: set[str]) -> set[str]:
    """Encoders published without their pooler do not use it: fill it with zeros so that loading is repeatable."""
    import torch

    filled = {name for name in missing if name.startswith("pooler.")}
    with torch.no_grad():
        for name in filled:
            model.get_parameter(name).zero_()
    return filled


def _load_python(reference: Reference, arguments: dict[str, Any]) -> nn.Module:
    from torch import nn

    _no_file_to_hash(reference)
    function = load_function(reference.location)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UsageError("the function does not take these arguments", where=reference.text, got=str(error)) from error
    except ValueError:
        pass  # a function of C without a signature: calling it tells
    model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise UsageError(
            "the function did not return a model",
            where=reference.text,
            expected="a torch.nn.Module",
            got=type(model).__name__,
        )
    if "_deploy_prune_architecture" not in vars(model):  # a function may name a cheaper builder than itself
        Architecture("python", reference.location, arguments).attach(model)
    return model


def _no_file_to_hash(reference: Reference) -> None:
    if reference.sha256 is not None:
        raise UsageError(
            "an expected sha256 needs a weights file", where=reference.text, expected="timm:NAME@FILE, hf: or gguf:"
        )


def _is_local(location: str) -> bool:
    """Hub names are `name` or `owner/name`; everything else, and every existing directory, is local."""
    looks_like_path = location.startswith((PACKAGE, "/", ".", "~")) or location.count("/") > 1
    return looks_like_path or local_path(location).is_dir()


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with without_progress_bars():
            return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_SKIP)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UnavailableError(
            "cannot get the model from the hub, and it is not in the local cache",
            where=hub_id,
            got=str(error).splitlines()[0],
            remedy=_OFFLINE_REMEDY,
        ) from error


def _cached(hub_id: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, file), str)


def _importable(location: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(location.partition(":")[0]) is not None
    except ImportError:
        return False
