"""Every kind of data reference gives the columns tasks look for, or says which option is missing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy_prune.data import Examples, load_data
from deploy_prune.errors import DataError, UnavailableError, UsageError


def image_bytes(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def test_digits_parts_are_disjoint_stratified_and_whole() -> None:
    pytest.importorskip("sklearn")
    train, test, everything = (load_data(ref) for ref in ("digits:train", "digits:test", "digits"))
    assert len(train) + len(test) == len(everything) == 1797
    counts = [np.bincount(list(part.labels())) for part in (train, test)]
    assert np.all(np.abs(counts[1] / (counts[0] + counts[1]) - 0.25) < 0.01)
    images = np.stack(list(everything.column("image")))
    assert images.shape == (1797, 8, 8) and images.dtype == np.float32
    assert (images.min(), images.max()) == (0, 1)


def test_unknown_digits_part_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'train'"):
        load_data("digits:trian")


@pytest.mark.parametrize(("folders", "labels"), [(("0007", "0003"), [3, 7]), (("dog", "cat", "12"), [0, 1, 2])])
def test_imagefolder_label_is_the_integer_name_or_the_sorted_index(
    tmp_path: Path, folders: tuple[str, ...], labels: list[int]
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(image_bytes())
        (tmp_path / folder / "notes.txt").write_text("no image")
    data = load_data(f"imagefolder:{tmp_path}")
    assert list(data.labels()) == labels
    assert data[0]["image"].size == (4, 4)


def test_loose_images_are_unlabeled(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes())
    data = load_data(f"imagefolder:{tmp_path}")
    assert data.columns == ("image",)
    with pytest.raises(DataError, match="unlabeled"):
        data.labels()


def test_image_is_decoded_when_touched_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "broken.png").write_bytes(image_bytes()[:40])
    data = load_data(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match=r"broken\.png"):
        _ = data[0]


def test_empty_image_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples"):
        load_data(f"imagefolder:{tmp_path}")


def test_tsv_takes_quotes_as_text_and_ignores_the_byte_order_mark(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", '\ufeffsentence\tlabel\n"half quoted\t1\nit \'s "fine" \t0\n')
    data = load_data(f"tsv:{file}?text=sentence")
    assert data.columns == ("text", "label")
    assert list(data.column("text")) == ['"half quoted', 'it \'s "fine" ']
    assert list(data.labels()) == [1, 0]


def test_csv_takes_quotes_as_quoting(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'text,label\n"one, two",1\n"say ""x""\nnow",0\n')
    assert list(load_data(f"csv:{file}").column("text")) == ["one, two", 'say "x"\nnow']


def test_ragged_lines_pass_when_the_mapped_columns_are_there(tmp_path: Path) -> None:
    file = write(tmp_path / "sts.tsv", "g\tf\ty\t1\t5.000\tA man.\tA person.\ng\tf\ty\t2\t3.800\tB.\tC.\textra\turl\n")
    data = load_data(f"tsv:{file}?header=0&score=4&text=5&text2=6")
    assert data[1] == {"score": 3.8, "text": "B.", "text2": "C."}


def test_line_without_a_mapped_column_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "text\tlabel\nx\t1\ny\n")
    with pytest.raises(DataError, match=r"a\.tsv:3"):
        load_data(f"tsv:{file}")


def test_missing_column_suggests_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "sentence\tlabel\nx\t1\n")
    with pytest.raises(DataError, match="Did you mean 'sentence'"):
        load_data(f"tsv:{file}?text=sentense")
    with pytest.raises(DataError, match=r"\?text=COLUMN"):
        load_data(f"tsv:{file}").column("text")


def test_label_names_take_their_place_in_the_option(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "text\tlabel\nx\tyes\ny\tno\n")
    assert list(load_data(f"tsv:{file}").labels()) == ["yes", "no"]
    assert list(load_data(f"tsv:{file}?labels=no,yes").labels()) == [1, 0]
    with pytest.raises(DataError, match="yes"):
        load_data(f"tsv:{file}?labels=no,maybe")


def test_partly_unlabeled_data_says_where(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "text\tlabel\nx\t1\ny\t-1\n")
    with pytest.raises(DataError, match="1 of 2, the first at row 1"):
        load_data(f"tsv:{file}").labels()


@pytest.mark.parametrize("text", ["", "text\tlabel\n"])
def test_empty_table_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="no examples"):
        load_data(f"tsv:{write(tmp_path / 'a.tsv', text)}")


def test_text_is_one_example_or_one_per_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one\n\ntwo\n")
    assert list(load_data(f"text:{file}").column("text")) == ["one\n\ntwo\n"]
    assert list(load_data(f"text:{file}?lines=1").column("text")) == ["one", "two"]
    with pytest.raises(DataError, match="no examples"):
        load_data(f"text:{write(tmp_path / 'blank.txt', '  ')}")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        load_data(f"text:{tmp_path / 'a.txt'}")


def test_npz_arrays_are_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, x=np.zeros((3, 2, 2), np.uint8), y=np.arange(3))
    data = load_data(f"npz:{file}?image=x&label=y")
    assert data[2]["image"].shape == (2, 2) and data[2]["label"] == 2


def test_npz_with_objects_or_unequal_columns_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "object.npz", x=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="object arrays"):
        load_data(f"npz:{tmp_path / 'object.npz'}")
    np.savez(tmp_path / "unequal.npz", image=np.zeros((3, 2)), label=np.zeros(2))
    with pytest.raises(DataError, match="differ in length"):
        load_data(f"npz:{tmp_path / 'unequal.npz'}")


def test_parquet_image_bytes_are_decoded(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"img": {"bytes": image_bytes(9), "path": None}, "label": 4}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = load_data(f"parquet:{tmp_path / 'a.parquet'}?image=img")
    assert data[0]["image"].getpixel((0, 0)) == (9, 9, 9) and data[0]["label"] == 4
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:50])
    with pytest.raises(DataError, match="parquet"):
        load_data(f"parquet:{tmp_path / 'b.parquet'}")


def test_rows_are_cut_by_start_and_stop(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a\nb\nc\nd\n")
    assert list(load_data(f"text:{file}?lines=1&start=1&stop=3").column("text")) == ["b", "c"]
    with pytest.raises(DataError, match="no examples"):
        load_data(f"text:{file}?lines=1&start=9")
    with pytest.raises(UsageError, match="row number"):
        load_data(f"text:{file}?start=-1")


def test_unknown_option_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'header'"):
        load_data(f"tsv:{tmp_path}/a.tsv?heder=0")


def test_missing_file_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no such file"):
        load_data(f"text:{tmp_path}/absent.txt")


def test_hub_data_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UnavailableError, match="Go online once"):
        load_data("hf:no-such-owner/no-such-data:train")


def test_hub_data_gives_the_columns_of_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.csv", "sentence,label\na,0\nb,1\n")
    write(folder / "test.csv", "sentence,label\nc,1\n")
    assert list(load_data(f"hf:{folder}:train?text=sentence").column("text")) == ["a", "b"]
    with pytest.raises(UsageError, match=r"which split[\s\S]*test, train"):
        load_data(f"hf:{folder}")
    with pytest.raises(UsageError, match="dev"):
        load_data(f"hf:{folder}:dev")


def test_wrong_hash_of_a_data_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one")
    with pytest.raises(Exception, match="not the one the reference names"):
        load_data(f"text:{file}#sha256={'0' * 64}")


def test_rows_are_dictionaries_of_columns() -> None:
    data = Examples("made", {"text": ["a", "b"], "label": [0, 1]})
    assert [row["label"] for row in data] == [0, 1]
    with pytest.raises(IndexError):
        _ = data[2]
