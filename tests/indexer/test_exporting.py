"""All that a library knows, as a table: every photo, every word, in three formats that agree."""

import csv
import json

import pyarrow.parquet
import pytest

from indexer.errors import LibraryError
from indexer.exporting import COLUMNS, LISTS
from tests.indexer.conftest import paint


@pytest.fixture
def organised(library, photos):
    red = photos / "red.png"
    library.add_caption(red, 'a "red" wall;\nwith, commas')
    library.caption(str(red))
    library.tag(red, ["wall", "paint; wet"])
    library.create_album("Walls")
    library.add_to_album("walls", [red, photos / "blue.png"])
    library.rate(red, 4)
    library.set_favourite(red)
    library.set_title(red, "Ü")
    paint(photos / "copy" / "red again.png", (230, 20, 20))
    (photos / "green.png").unlink()
    library.index(photos, workers=0)
    return library


def test_json_lines_hold_everything(organised, photos, tmp_path):
    assert organised.export(tmp_path / "all.json", "json") == 4
    rows = [json.loads(line) for line in (tmp_path / "all.json").read_text().splitlines()]
    by_name = {(row["paths"] or row["missing_paths"])[-1].rpartition("/")[2]: row for row in rows}
    red, green = by_name["red.png"], by_name["green.png"]
    assert tuple(red) == COLUMNS
    assert red["paths"] == [str(photos / "copy" / "red again.png"), str(photos / "red.png")]
    assert [caption["text"] for caption in red["captions"]] == ['a "red" wall;\nwith, commas', "a red picture"]
    assert [tag["name"] for tag in red["tags"]] == ["wall", "paint; wet"] and red["albums"] == ["Walls"]
    assert (red["rating"], red["favourite"], red["title"]) == (4, True, "Ü")
    assert (green["paths"], green["missing_paths"]) == ([], [str(photos / "green.png")])


def test_the_three_formats_agree(organised, tmp_path):
    for kind in ("csv", "json", "parquet"):
        organised.export(tmp_path / f"all.{kind}", kind)
    lines = [json.loads(line) for line in (tmp_path / "all.json").read_text().splitlines()]
    table = pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pylist()
    with (tmp_path / "all.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert len(lines) == len(table) == len(cells) == 4
    for line, row, texts in zip(lines, table, cells, strict=True):
        assert json.loads(json.dumps(row, default=lambda moment: moment.isoformat())) == line
        for column, value in line.items():
            if column in LISTS:
                assert json.loads(texts[column]) == value
            else:
                plain = int(value) if isinstance(value, bool) else value
                assert texts[column] == ("" if value is None else str(plain))


def test_an_export_replaces_nothing_unless_told(organised, tmp_path):
    file = tmp_path / "all.csv"
    file.write_text("mine")
    with pytest.raises(LibraryError, match="nothing is overwritten"):
        organised.export(file)
    assert organised.export(file, replace=True) == 4
    with pytest.raises(LibraryError, match="no format 'xls'"):
        organised.export(tmp_path / "all.xls", "xls")
    with pytest.raises(LibraryError, match="cannot be written"):
        organised.export(tmp_path / "no" / "folder.csv")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_empty_library_exports_headings(open_library, tmp_path):
    library = open_library("empty")
    for kind in ("csv", "json", "parquet"):
        assert library.export(tmp_path / f"all.{kind}", kind) == 0
    assert (tmp_path / "all.csv").read_text().strip().split(",") == list(COLUMNS)
    assert pyarrow.parquet.read_table(tmp_path / "all.parquet").column_names == list(COLUMNS)
