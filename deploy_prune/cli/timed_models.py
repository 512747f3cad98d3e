"""Which files `deploy-prune bench` times: of a bundle or loose, and what runtimes compute in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy_prune.errors import ArtifactError, UsageError

BASELINE = "dense"


def find_models(arguments: Sequence[str], *, decoders: bool = False) -> dict[str, Path]:
    """Name -> ONNX file, the baseline first; of a bundle its models, or its `decoders` with a cache. Raises UsageError,
    UnavailableError or ArtifactError."""
    from deploy_prune.files import existing

    paths = [existing(argument, "bundle or ONNX file") for argument in arguments]
    directories = [path for path in paths if path.is_dir()]
    if not directories:
        return _name(paths)
    if len(paths) > 1:
        raise UsageError(
            "a bundle is timed alone",
            got=", ".join(arguments),
            remedy="Give one bundle, or the ONNX files themselves: BUNDLE/models/*.onnx.",
        )
    files = _bundle_models(directories[0], decoders)
    if BASELINE not in files:
        raise UsageError(
            f"the bundle has no dense {'decoder with a cache' if decoders else 'model'} to compare with",
            where=arguments[0],
            expected=f"decoders/{BASELINE}/model.onnx" if decoders else f"models/{BASELINE}.onnx",
            got=", ".join(files) or "no models",
            remedy="Make it again with --set export.cache=true."
            if decoders and not files
            else "Give the ONNX files themselves; the first one is the baseline.",
        )
    return {BASELINE: files.pop(BASELINE), **files}


def uncomputed(files: Mapping[str, Path], runtimes: Sequence[str], *, steps: bool = False) -> dict[str, dict[str, str]]:
    """Runtime -> model -> its precision, of those that the runtime does not compute in: their time would say nothing.
    `steps`: of decoders, whose caches are made up.

    Raises UsageError when that is the baseline, the first of `files`; ArtifactError for a file that is not ONNX.
    """
    from converters.precision.formats import RUNS, runs, steps_run
    from converters.precision.given import precision_of

    computes = steps_run if steps else runs
    precisions = {name: precision_of(file) for name, file in files.items()}
    found = {}
    for runtime in runtimes:
        others = {name: precision for name, precision in precisions.items() if not computes(runtime, precision)}
        if (baseline := next(iter(files))) in others:
            able = [other for other in RUNS if computes(other, others[baseline])]
            raise UsageError(
                "the baseline is in a precision that the runtime does not compute in",
                where=baseline,
                got=f"{others[baseline]} for {runtime}",
                remedy=f"Give an fp32 file first, or choose a runtime that does: {', '.join(able) or 'none here'}.",
            )
        if others:
            found[runtime] = others
    return found


def _bundle_models(bundle: Path, decoders: bool) -> dict[str, Path]:
    """The models a manifest lists, or their decoders; without one, the ONNX files in `models/` or in the directory
    itself, or those of `decoders/`."""
    from deploy_prune.files import read_json

    manifest = bundle / "manifest.json"
    if not manifest.exists() and decoders:
        return {file.parent.name: file for file in sorted(bundle.glob("decoders/*/model.onnx"))}
    if not manifest.exists():
        folder = bundle / "models" if (bundle / "models").is_dir() else bundle
        return _name(sorted(folder.glob("*.onnx"))) if any(folder.glob("*.onnx")) else {}
    data = read_json(manifest)
    try:
        files = {
            str(member["name"]): bundle / str((member["decoder"] if decoders else member)["file"])
            for member in data["members"]
            if not decoders or member["decoder"]
        }
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            "the manifest does not list its models",
            where=str(manifest),
            got=repr(error),
            remedy="Run `deploy-prune verify` on the bundle.",
        ) from error
    for name, file in files.items():
        if not file.resolve().is_relative_to(bundle.resolve()):
            raise ArtifactError(
                "the manifest names a file outside the bundle", where=str(manifest), got=f"{name}: {file}"
            )
        if not file.exists():
            raise ArtifactError(
                "a model of the bundle is missing", where=str(file), remedy="Run `deploy-prune verify` on the bundle."
            )
    return files


def _name(paths: Sequence[Path]) -> dict[str, Path]:
    """Short distinct names: the file's own, with its directory's where two files share one."""
    stems = [path.stem for path in paths]
    names = [f"{path.resolve().parent.name}/{path.stem}" if stems.count(path.stem) > 1 else path.stem for path in paths]
    if len(set(names)) < len(names):
        raise UsageError(
            "two models have the same name",
            got=", ".join(map(str, paths)),
            remedy="Give each file once; the baseline is timed twice anyway.",
        )
    return dict(zip(names, paths, strict=True))
