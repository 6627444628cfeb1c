"""The filter language: what it selects, and what it says when it cannot be read."""

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, select

from indexer.catalog import Catalog, now
from indexer.errors import QueryError
from indexer.query import FIELDS, Query, compile_filter
from indexer.schema import Caption, File, Photo

ROWS = [
    {
        "id": 1,
        "width": 4000,
        "taken_at": date(2023, 6, 30),
        "camera_model": "Pixel 7",
        "latitude": 1.0,
        "format": "JPEG",
    },
    {
        "id": 2,
        "width": 600,
        "taken_at": date(2023, 7, 1),
        "camera_model": "pixel_7 pro",
        "latitude": None,
        "format": "PNG",
    },
    {"id": 3, "width": 600, "taken_at": None, "camera_model": None, "latitude": None, "format": "PNG"},
]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    from datetime import datetime

    catalog = Catalog(tmp_path_factory.mktemp("catalog") / "catalog.sqlite")
    with catalog.transaction() as connection:
        for row in ROWS:
            values = dict(row, content_hash=str(row["id"]), bytes=10, height=100, orientation=1, added_at=now())
            values["taken_at"] = row["taken_at"] and datetime(
                row["taken_at"].year, row["taken_at"].month, row["taken_at"].day, 12
            )
            connection.execute(insert(Photo).values(values))
            path = f"/photos/{2020 + row['id']}/img_{row['id']}.jpg"
            connection.execute(insert(File).values(photo_id=row["id"], path=path, size=1, mtime_ns=1))
        caption = {"photo_id": 2, "text": "A red 100% wool hat", "source": "user", "created_at": now()}
        connection.execute(insert(Caption).values(caption))
    yield catalog
    catalog.close()


def selected(catalog, where):
    return [row.id for row in catalog.rows(select(Photo.id).where(compile_filter(where)).order_by(Photo.id))]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("year=2023", [1, 2]),
        ("taken=2023-06", [1]),
        ("taken=2023-06-30", [1]),
        ("taken>2023-06", [2]),
        ("taken<=2023-06", [1]),
        ("taken!=2023-07-01", [1, 3]),
        ("month=7", [2]),
        ("camera=Pixel*", [1, 2]),
        ("camera=pixel_7*", [2]),
        ('camera="Pixel ?"', [1]),
        ("width>=4000", [1]),
        ("width=600 format=png", [2, 3]),
        ("width=4000 OR has:caption", [1, 2]),
        ("NOT has:gps", [2, 3]),
        ("NOT (width=600 AND has:date)", [1, 3]),
        ("folder=/photos/2021", [1]),
        ("folder!=/photos/2021", [2, 3]),
        ("file=img_3", [3]),
        ("caption=wool", [2]),
        ('caption="100%"', [2]),
        ("caption=10_%", []),
        ("id=3", [3]),
        ({"year": 2023, "camera": "Pixel*"}, [1, 2]),
        ({"taken": date(2023, 6, 30)}, [1]),
        ({"has": "camera", "width": 600}, [2]),
    ],
)
def test_a_filter_selects(catalog, where, expected):
    assert selected(catalog, where) == expected


def test_no_filter_filters_nothing():
    assert compile_filter(None) is None and compile_filter("") is None and compile_filter({}) is None


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("year=", "position 6"),
        ("year=2023 AND", "position 14"),
        ("(year=2023", "position 11"),
        ("colour=red", "no filter 'colour'"),
        ("year=soon", "year needs a number"),
        ("taken=yesterday", "needs a date like 2023"),
        ("has:wings", "has takes gps"),
        ("camera>Pixel", "compares with = or !="),
        ({"nonsense": 1}, "no filter 'nonsense'"),
    ],
)
def test_an_error_names_the_place(where, message):
    with pytest.raises(QueryError, match=message.replace("(", r"\(")):
        compile_filter(where)


@given(st.text(alphabet=st.sampled_from('abcyear=<>!()" *?-0123456789ANDORT:')))
def test_no_text_crashes_the_filter(text):
    try:
        compile_filter(text)
    except QueryError as error:
        assert str(error)


def test_every_field_is_documented_in_the_error():
    with pytest.raises(QueryError) as caught:
        compile_filter({"x": 1})
    assert all(name in str(caught.value) for name in FIELDS)


def test_a_query_needs_words_or_a_photo():
    with pytest.raises(QueryError):
        Query()
    assert Query(text="a dog").without == ()
