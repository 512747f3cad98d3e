"""One reader per kind of data reference: from a location to raw columns, images undecoded until touched."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from deploy_prune.errors import DataError, UnavailableError, UsageError, did_you_mean
from deploy_prune.references import Reference, existing_path

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
ROLES = ("image", "text", "text2", "label", "score")  # the column names tasks look for
_TEST_EVERY = 4

Column = Sequence[Any]


class Lazy(Sequence[Any]):
    """A column whose values are made on access: `Lazy(3, lambda i: i * i)`."""

    def __init__(self, size: int, make: Callable[[int], Any]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        return self._make(index + self._size if index < 0 else index)


class ImageFiles(Lazy):
    """A column of images named by file; `keys` are the names, equal for rows that show the same image."""

    def __init__(self, names: Sequence[Any], folder: Path) -> None:
        self.keys = [str(name) for name in names]
        files = [folder / name for name in self.keys]
        if absent := [file for file in dict.fromkeys(files) if not file.is_file()]:
            raise UnavailableError(
                f"{len(absent)} image files are missing", where=str(folder), got=", ".join(f.name for f in absent[:3])
            )
        super().__init__(len(files), lambda i: open_image(files[i].read_bytes(), str(files[i])))


def digits(reference: Reference) -> dict[str, Column]:
    """Images as float32 (8, 8) in [0, 1]; the test part is every fourth example of each class, in file order."""
    import numpy as np

    part = reference.location
    if part not in ("", "train", "test"):
        raise UsageError(
            "digits has no such part",
            where=repr(reference.text),
            got=part,
            remedy=did_you_mean(part, ["train", "test"]),
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnavailableError(
            "the digits come with scikit-learn, which is not installed", remedy="Install it: pip install scikit-learn"
        ) from error
    images, labels = load_digits(return_X_y=True)
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    rows = np.flatnonzero({"train": ~test, "test": test, "": np.ones_like(test)}[part])
    scaled = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    return {"image": [scaled[row] for row in rows], "label": [int(labels[row]) for row in rows]}


def imagefolder(reference: Reference) -> dict[str, Column]:
    """Images of every class folder, sorted by path; images that lie in no class folder have no label."""
    root = existing_path(reference.location, "image directory")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    found = [(file, index) for index, folder in enumerate(folders) for file in _images(folder.rglob("*"))]
    if not found:
        files = _images(root.iterdir())
        return {"image": Lazy(len(files), lambda i: open_image(files[i].read_bytes(), str(files[i])))}
    names = [folder.name for folder in folders]
    values = [int(name) for name in names] if all(name.isdecimal() for name in names) else list(range(len(names)))
    return {
        "image": Lazy(len(found), lambda i: open_image(found[i][0].read_bytes(), str(found[i][0]))),
        "label": [values[index] for _, index in found],
    }


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def open_image(data: bytes, where: str) -> Any:
    """A decoded PIL image. Raises DataError that names the image when its bytes cannot be decoded."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            "cannot decode this image",
            where=where,
            got=str(error),
            remedy="It is damaged or no image; remove or replace it.",
        ) from error
    return image


def tsv_file(reference: Reference) -> dict[str, Column]:
    """Fields are what lies between tabs: quotes mean nothing. A line may have more fields than the header."""
    path = existing_path(reference.location)
    lines = _decoded(path).split("\n")
    rows = [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines, 1) if line.strip("\r")]
    return _table(rows, reference)


def csv_file(reference: Reference) -> dict[str, Column]:
    import csv

    path = existing_path(reference.location)
    reader = csv.reader(io.StringIO(_decoded(path), newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError("not valid CSV", where=f"{path}:{reader.line_num}", got=str(error)) from error
    return _table(rows, reference)


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", where=str(path), got=str(error)) from error


def _table(rows: list[tuple[int, list[str]]], reference: Reference) -> dict[str, Column]:
    """Columns by header name and, so that options may count, by position ("0", "1", ...) where mapped so.

    When options map columns, only these and the columns already named as roles are read, so that ragged lines may pass.
    """
    header = reference.options.get("header", "1")
    if header not in ("0", "1"):
        raise UsageError("header is 0 or 1", where=repr(reference.text), got=header)
    if not rows:
        raise DataError("no examples", where=reference.text, got="an empty file")
    names = rows[0][1] if header == "1" else [str(i) for i in range(len(rows[0][1]))]
    body = rows[1:] if header == "1" else rows
    mapped = [reference.options[role] for role in ROLES if role in reference.options]
    named = [name for name in names if name in ROLES and name not in reference.options and name not in mapped]
    wanted = mapped + named if mapped else names
    positions = {name: index for index, name in enumerate(names)}
    for name in wanted:
        if name not in positions:
            if not name.isdecimal() or int(name) >= len(names):
                raise DataError(f"no column {name!r}", where=reference.text, remedy=did_you_mean(name, names))
            positions[name] = int(name)
    columns: dict[str, Column] = {}
    for name in wanted:
        column = []
        for number, fields in body:
            if len(fields) <= positions[name]:
                raise DataError(
                    "line is too short",
                    where=f"{reference.location}:{number}",
                    expected=f"at least {positions[name] + 1} fields, for column {name!r}",
                    got=str(len(fields)),
                )
            column.append(fields[positions[name]])
        columns[name] = _numbers(column) if name in _numeric(reference) else column
    return columns


def _numeric(reference: Reference) -> set[str]:
    return {reference.options.get(role, role) for role in ("label", "score")}


def _numbers(column: list[str]) -> Column:
    """Labels and scores as int or float where all of them are numbers, else as they are (names of classes)."""
    for convert in (int, float):
        try:
            return [convert(value) for value in column]
        except ValueError:
            continue
    return column


def text_file(reference: Reference) -> dict[str, Column]:
    text = _decoded(existing_path(reference.location))
    lines = reference.options.get("lines", "0")
    if lines not in ("0", "1"):
        raise UsageError("lines is 0 or 1", where=repr(reference.text), got=lines)
    if lines == "1":
        return {"text": [line for line in text.splitlines() if line.strip()]}
    return {"text": [text] if text.strip() else []}


def npz_file(reference: Reference) -> dict[str, Column]:
    import zipfile

    import numpy as np

    path = existing_path(reference.location)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise DataError(
            "not a readable .npz of plain arrays",
            where=str(path),
            got=str(error)[:200],
            remedy="Write it with numpy.savez; object arrays are not read.",
        ) from error
    scalars = [name for name, array in arrays.items() if array.ndim == 0]
    if scalars:
        raise DataError("arrays without a first index", where=str(path), got=", ".join(scalars))
    return {n: Lazy(len(a), a.__getitem__) if a.ndim > 1 else a.tolist() for n, a in arrays.items()}


def parquet_file(reference: Reference) -> dict[str, Column]:
    """Columns of a parquet file; binary values, bare or as {bytes, path}, in the image column are decoded on access."""
    path = existing_path(reference.location)
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise UnavailableError("reading parquet needs pyarrow", remedy="pip install 'deploy-prune[data]'") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("not a readable parquet file", where=str(path), got=str(error)[:200]) from error
    image = reference.options.get("image", "image")
    return {n: _image_column(table[n], n, path) if n == image else table[n].to_pylist() for n in table.column_names}


def _image_column(column: Any, name: str, path: Path) -> Column:
    def make(index: int) -> Any:
        value = column[index].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(
                f"column {name!r} holds no image bytes", where=f"{path}, row {index}", got=type(value).__name__
            )
        return open_image(data, f"{path}, row {index}")

    return Lazy(len(column), make)


def hub(reference: Reference) -> dict[str, Column]:
    """Columns of one split of a hub dataset."""
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError(
            "hub data needs the package datasets", remedy="pip install 'deploy-prune[data]'"
        ) from error
    name, _, split = reference.location.partition(":")
    try:
        loaded = datasets.load_dataset(name, reference.options.get("config"), split=split or None)
    except ValueError as error:  # also how it reports an unknown configuration or split, with the known ones
        raise UsageError("the hub does not offer this dataset so", where=reference.text, got=str(error)) from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnavailableError(
            "cannot get the dataset from the hub, and it is not in the local cache",
            where=name,
            got=reason,
            remedy="Go online once to download it (and unset HF_HUB_OFFLINE), or name a local file.",
        ) from error
    if not split:
        if len(loaded) > 1:
            raise UsageError(
                "which split?",
                where=reference.text,
                expected=f"hf:{name}:SPLIT",
                remedy=did_you_mean("", [str(known) for known in loaded]),
            )
        loaded = next(iter(loaded.values()))
    return {key: _hub_column(loaded, key) for key in loaded.column_names}


def _hub_column(table: Any, key: str) -> Column:
    """Plain values at once; images and other decoded features one by one when touched."""
    part = table.select_columns([key])
    if type(part.features[key]).__name__ in ("Value", "ClassLabel"):
        return list(part[:][key])
    return Lazy(len(part), lambda i: part[i][key])
