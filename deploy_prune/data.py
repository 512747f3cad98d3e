"""Data references become `Examples`: a table of columns whose rows are made when they are asked for.

    digits[:train|:test]     scikit-learn's 1,797 digits, 8x8; every fourth of each class is the test part
    imagefolder:DIR          DIR/CLASS/*.jpg; the label is the folder name when all are integers, else its sorted index
    csv:FILE  tsv:FILE       one example per line; tsv has no quoting (as GLUE)
    text:FILE                one example, the whole text
    npz:FILE  parquet:FILE   one example per first index of every array; per row (image bytes are decoded)
    hf:ID[:SPLIT]            a dataset of the hub, or of its local cache

Tasks look for the columns `image`, `text`, `text2`, `label` and `score`. Where the data calls them otherwise, an option
maps them: `tsv:dev.tsv?text=sentence`. Options, joined with `&`, special characters percent-encoded:

    image= text= text2= label= score=   column by name; a number counts columns from 0 (csv, tsv)
    header=0                            csv, tsv: the first line is an example already
    images=DIR                          csv, tsv: the column image names files in this folder beside the table
    labels=neg,pos                      names of the classes in the order of their indices
    lines=1                             text: one example per line that is not blank
    config=NAME                         hf: which configuration of the dataset
    start=N stop=M                      only the rows N to M-1

`FILE` and `DIR` may be `package:MODULE/path` (see references).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deploy_prune import data_readers as read
from deploy_prune.data_readers import ROLES, Column, Lazy
from deploy_prune.errors import DataError, UsageError, did_you_mean
from deploy_prune.references import DATA_SCHEMES, Reference, data_reference, existing_path

_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "csv": ("header", "images"),
    "tsv": ("header", "images"),
    "text": ("lines",),
    "hf": ("config",),
}


class Examples:
    """`Examples("tsv:dev.tsv", {"text": [...], "label": [...]})`: equally long columns; `[i]` is one row as a dict."""

    def __init__(self, reference: str, columns: Mapping[str, Column]) -> None:
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) > 1:
            raise DataError("columns differ in length", where=reference, got=str(sizes))
        if not sizes or not next(iter(sizes.values())):
            raise DataError("no examples", where=reference, remedy="Check the location and the start/stop options.")
        self.reference = reference
        self._columns = dict(columns)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {name: column[index] for name, column in self._columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def column(self, name: str) -> Column:
        """One column, without touching the others. Raises DataError, with the option that would map it, if absent."""
        if name not in self._columns:
            hint = f"Map it with an option: {self.reference}{'&' if '?' in self.reference else '?'}{name}=COLUMN. "
            raise DataError(f"no column {name!r}", where=self.reference, remedy=hint + did_you_mean(name, self.columns))
        return self._columns[name]

    def labels(self) -> Column:
        """The column `label`; raises DataError when the data has none or some are empty, None or -1."""
        if "label" not in self._columns:
            raise DataError(
                "the data is unlabeled",
                where=self.reference,
                got="columns " + ", ".join(self.columns),
                remedy="Map the label column with ?label=COLUMN, or ask for metric=agreement.",
            )
        labels = self._columns["label"]
        absent = [index for index in range(len(labels)) if labels[index] in (None, "", -1)]
        if absent:
            raise DataError(
                "some examples are unlabeled",
                where=self.reference,
                got=f"{len(absent)} of {len(self)}, the first at row {absent[0]}",
                remedy="Use a labeled split, or ask for metric=agreement.",
            )
        return labels


__all__ = ["Examples", "Lazy", "load_data"]


def load_data(ref: str) -> Examples:
    """The examples a reference names.

    Raises UsageError for an unknown kind or option, UnavailableError for what is missing here, DataError for data that
    is empty, damaged or lacks a mapped column.
    """
    reference = data_reference(ref)
    if reference.sha256 is not None:
        from deploy_prune.weights import check_sha256

        check_sha256(existing_path(reference.location), reference.sha256)
    known = (*ROLES, "labels", "start", "stop", *_OPTIONS.get(reference.scheme, ()))
    for name in reference.options:
        if name not in known:
            raise UsageError("unknown option", where=repr(ref), got=name, remedy=did_you_mean(name, known))
    readers: dict[str, Callable[[Reference], dict[str, Column]]] = {
        "digits": read.digits,
        "imagefolder": read.imagefolder,
        "hf": read.hub,
        "csv": read.csv_file,
        "tsv": read.tsv_file,
        "text": read.text_file,
        "npz": read.npz_file,
        "parquet": read.parquet_file,
    }
    assert set(readers) == set(DATA_SCHEMES)
    columns = _mapped(readers[reference.scheme](reference), reference)
    columns = _opened(_cut(columns, reference), reference)
    return Examples(ref, _indexed(columns, reference))


def _mapped(columns: dict[str, Column], reference: Reference) -> dict[str, Column]:
    """Columns under the names of their roles. A mapped column no longer goes by its own name."""
    taken = {role: reference.options[role] for role in ROLES if role in reference.options}
    for role, name in taken.items():
        if name not in columns:
            raise DataError(
                f"no column {name!r} for {role!r}", where=reference.text, remedy=did_you_mean(name, list(columns))
            )
    mapped = {role: columns[name] for role, name in taken.items()}
    return {**mapped, **{n: c for n, c in columns.items() if n not in mapped and n not in taken.values()}}


def _cut(columns: dict[str, Column], reference: Reference) -> dict[str, Column]:
    if not {"start", "stop"} & reference.options.keys():
        return columns
    bounds = {}
    for name in ("start", "stop"):
        value = reference.options.get(name, "")
        if value and not value.isdecimal():
            raise UsageError(f"{name} is not a row number", where=reference.text, got=value)
        bounds[name] = int(value) if value else None

    def cut(column: Column) -> Column:
        rows = range(len(column))[bounds["start"] : bounds["stop"]]
        return Lazy(len(rows), lambda i: column[rows[i]])

    return {name: cut(column) for name, column in columns.items()}


def _opened(columns: dict[str, Column], reference: Reference) -> dict[str, Column]:
    """Image files of the folder that the option `images` names, in place of their names."""
    folder = reference.options.get("images")
    if folder is None:
        return columns
    if "image" not in columns:
        raise DataError(
            "no column 'image' names the files",
            where=reference.text,
            got=", ".join(columns),
            remedy="Map it with ?image=COLUMN.",
        )
    place = existing_path(reference.location).parent / folder
    return {**columns, "image": read.ImageFiles(columns["image"], place)}


def _indexed(columns: dict[str, Column], reference: Reference) -> dict[str, Column]:
    """Replace label names by their position in the option `labels=a,b,c`."""
    names = reference.options.get("labels")
    if names is None or "label" not in columns:
        return columns
    position = {name: index for index, name in enumerate(names.split(","))}
    unknown = sorted({str(v) for v in columns["label"]} - position.keys())
    if unknown:
        raise DataError(
            "labels that the option does not list", where=reference.text, expected=names, got=", ".join(unknown[:10])
        )
    return {**columns, "label": [position[str(v)] for v in columns["label"]]}
