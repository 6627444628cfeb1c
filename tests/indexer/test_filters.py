"""The filter language: what it selects, and what it says when it cannot be read."""

import re
from datetime import date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, select

from indexer.catalog import Catalog, now
from indexer.errors import QueryError
from indexer.filters import FIELDS, FilterText, Phrase, compile_filter, compile_filters
from indexer.schema import Album, AlbumPhoto, Answer, Caption, File, Photo, Tag

EIFFEL, LOUVRE, FIJI, TONGA = (48.8584, 2.2945), (48.8606, 2.3376), (-17.8, 178.0), (-21.2, -175.2)
ROWS = [
    {
        "id": 1, "width": 4000, "height": 3000, "bytes": 5_000_000, "taken_at": datetime(2023, 6, 30, 12),
        "camera_model": "Pixel 7", "place": EIFFEL, "format": "JPEG", "rating": 5, "favourite": True,
        "title": "Sunset over Paris",
    },
    {
        "id": 2, "width": 600, "height": 800, "bytes": 90_000, "taken_at": datetime(2023, 7, 1, 12),
        "camera_model": "pixel_7 pro", "place": None, "format": "PNG", "rating": 2,
    },
    {"id": 3, "width": 600, "height": 600, "bytes": 10, "place": None, "format": "PNG"},
    {"id": 4, "width": 600, "height": 400, "bytes": 2_000_000, "place": LOUVRE, "format": "HEIF", "lens": "50mm"},
    {"id": 5, "width": 600, "height": 401, "bytes": 10, "place": TONGA, "format": "TIFF",
     "taken_at": datetime(2019, 12, 31, 23, 59)},
]  # fmt: skip


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    catalog = Catalog(tmp_path_factory.mktemp("catalog") / "catalog.sqlite")
    with catalog.transaction() as connection:
        for row in ROWS:
            values = {"content_hash": str(row["id"]), "orientation": 1, "added_at": now()} | row
            values["latitude"], values["longitude"] = values.pop("place") or (None, None)
            connection.execute(insert(Photo).values(values))
            path = f"/photos/{2020 + row['id']}/img_{row['id']}.jpg"
            connection.execute(insert(File).values(photo_id=row["id"], path=path, size=1, mtime_ns=1))
        captions = {2: "A red 100% wool hat", 4: "the golden gate at dawn"}
        for photo_id, words in captions.items():
            values = {"photo_id": photo_id, "text": words, "source": "user", "created_at": now()}
            connection.execute(insert(Caption).values(values))
        connection.execute(insert(Album).values(id=1, name="Summer 2023", created_at=now()))
        connection.execute(insert(AlbumPhoto).values(album_id=1, photo_id=2, added_at=now()))
        connection.execute(insert(Tag).values(photo_id=1, name="Eiffel Tower", source="user", created_at=now()))
        answer = {"photo_id": 5, "question": "how many people", "model": "x", "answer": "3", "created_at": now()}
        connection.execute(insert(Answer).values(answer))
    yield catalog
    catalog.close()


def selected(catalog, where):
    return [row.id for row in catalog.rows(select(Photo.id).where(compile_filter(where)).order_by(Photo.id))]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("year=2023", [1, 2]),
        ("year:2023", [1, 2]),
        ("year=2020..2023", [1, 2]),
        ("year=..2022", [5]),
        ("year!=2020..2023", [3, 4, 5]),
        ("taken=2023-06", [1]),
        ("taken=2023-06-30", [1]),
        ("taken>2023-06", [2]),
        ("taken<=2023-06", [1, 5]),
        ("taken!=2023-07-01", [1, 3, 4, 5]),
        ("taken=2023-06..2023-07", [1, 2]),
        ("taken=2019..2023-06", [1, 5]),
        ("taken=2023-07..", [2]),
        ("taken=..2019", [5]),
        ("added>2020", [1, 2, 3, 4, 5]),
        ("month=7", [2]),
        ("month=june", [1]),
        ("month=Jun..Jul", [1, 2]),
        ("camera=Pixel*", [1, 2]),
        ("camera=pixel_7*", [2]),
        ('camera="Pixel ?"', [1]),
        ("camera=“Pixel 7”", [1]),
        ("lens=50*", [4]),
        ("width>=4000", [1]),
        ("width=600 format=png", [2, 3]),
        ("type=png", [2, 3]),
        ("type=jpg OR type=.heic OR type:tif", [1, 4, 5]),
        ("width=4000 OR has:caption", [1, 2, 4]),
        ("NOT has:gps", [2, 3]),
        ("NOT (width=600 AND has:date)", [1, 3, 4]),
        ("folder=/photos/2021", [1]),
        ("folder!=/photos/2021", [2, 3, 4, 5]),
        ("folder=2021", [1]),
        ("folder=202? NOT folder=202", [1, 2, 3, 4, 5]),
        ("folder=photos/2022", [2]),
        ("file=img_3", [3]),
        ("caption=wool", [2]),
        ('caption="100%"', [2]),
        ("caption=10_%", []),
        ("title=paris", [1]),
        ("text=PARIS OR text=wool OR text=img_3", [1, 2, 3]),
        ("id=3", [3]),
        ("id=2..4", [2, 3, 4]),
        ("rating>=4", [1]),
        ("rating=1..2", [2]),
        ("favourite=yes", [1]),
        ("favorite=no", [2, 3, 4, 5]),
        ("is:favourite", [1]),
        ("has:rating", [1, 2]),
        ("has:tag OR has:album OR has:answer", [1, 2, 5]),
        ("tag=EIFFEL*", [1]),
        ('tag="eiffel  tower"', [1]),
        ("tag!=eiffel*", [2, 3, 4, 5]),
        ('album="summer 2023"', [2]),
        ("album:Summer*", [2]),
        ("album:Winter", []),
        ("orientation=portrait", [2]),
        ("orientation=landscape", [1, 4, 5]),
        ("orientation=square", [3]),
        ("size>2MB", [1]),
        ("size>=2MB", [1, 4]),
        ("size=50kB..1MB", [2]),
        ("size>=12MP", [1]),
        ("size=0.2MP..0.4MP", [3, 4, 5]),
        ("bytes=10", [3, 5]),
        ("near=48.8584,2.2945,1km", [1]),
        ("near=48.8584,2.2945,3200m", [1, 4]),
        ('near="48.8584, 2.2945, 2 mi"', [1, 4]),
        ("box=48.8,2.2,48.9,2.3", [1]),
        ("box=-30,170,-10,-170", [5]),
        ('answer("How many people?") > 2', [5]),
        ('answer("how many people") : 2..5', [5]),
        ("answer=3", [5]),
        ("height>=800 height<3000", [2]),
        ({"year": 2023, "camera": "Pixel*"}, [1, 2]),
        ({"taken": date(2023, 6, 30)}, [1]),
        ({"has": "camera", "width": 600}, [2]),
        ({"id": [1, 4]}, [1, 4]),
        ({"id": []}, []),
        (FilterText("dogs year=2023, big", 5, 14), [1, 2]),
        (FilterText("-year=2023", 1, 10, negated=True), [3, 4, 5]),
        (Phrase(("golden", "gate")), [4]),
        (Phrase(("gate", "golden")), []),
        (Phrase(("golden",), negated=True), [1, 2, 3, 5]),
    ],
)
def test_a_filter_selects(catalog, where, expected):
    assert selected(catalog, where) == expected


def test_every_field_is_among_the_examples_above():
    examples = " ".join(str(mark.args[1]) for mark in test_a_filter_selects.pytestmark)
    assert [field for field in FIELDS if not re.search(rf"\b{field}\b", examples)] == []


def test_no_filter_filters_nothing():
    assert compile_filter(None) is None and compile_filter("") is None and compile_filter({}) is None
    assert compile_filter("  ") is None and compile_filters(()) is None and compile_filters(("", None)) is None


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("year=", "position 6"),
        ("year=2023 AND", "position 14"),
        ("(year=2023", "position 11"),
        ("colour=red", "position 1.*no filter 'colour'"),
        ("year=2023 colour=red", "position 11: year=2023 >>>colour=red"),
        ("year=soon", "position 6: year=>>>soon .*year needs a number"),
        ("year=nan", "needs a number"),
        ("year=a..b", "needs a number"),
        ("year=..", "needs a beginning or an end"),
        ("month=jx", "needs a month"),
        ("taken=yesterday", "needs a date like 2023"),
        ("taken=2023-13", "needs a date like 2023"),
        ("taken=2023-06..soon", "needs a date like 2023"),
        ("taken=2023--06", "needs a date like 2023"),
        ("has:wings", "has takes gps"),
        ("is:pretty", "is takes favourite"),
        ("favourite=maybe", "yes or no"),
        ("orientation=round", "portrait, landscape, square"),
        ("size>big", "a size like 2MB"),
        ("size=1MB..2MP", "not both"),
        ("near=48,2", "as 48.85,2.35,10km"),
        ("near=98,2,1km", "as 48.85,2.35,10km"),
        ("near=48,2,far", "as 48.85,2.35,10km"),
        ("box=1,2,3", "two corners"),
        ("camera>Pixel", "position 8.*compares with = or !="),
        ('answer("") = 2', "position 8.*there is no question"),
        ('answer("how many?") = 2..', "position 23.*here stands a number"),
        ({"nonsense": 1}, "no filter 'nonsense'"),
        ({"year": "soon"}, "year needs a number"),
        (FilterText("dogs year=soon", 5, 14), "position 11: dogs year=>>>soon"),
    ],
)
def test_an_error_names_the_place(where, message):
    with pytest.raises(QueryError, match=message):
        compile_filter(where)


def test_a_long_filter_is_shown_around_the_place_only():
    with pytest.raises(QueryError) as caught:
        compile_filter("year=2023 " * 20 + "year=soon" + " year=2023" * 20)
    assert caught.value.position == 205 and len(str(caught.value)) < 200
    assert "year=>>>soon year=2023" in str(caught.value)


@given(st.text(alphabet=st.sampled_from('abcyear=<>!()" *?-.,0123456789ANDORT:“”')))
def test_no_text_crashes_the_filter(text):
    try:
        compile_filter(text)
    except QueryError as error:
        assert str(error)


VALUES = st.one_of(st.text(max_size=12), st.from_regex(r"[0-9.,-]{0,12}(km|MB|MP|)", fullmatch=True))


@given(st.sampled_from(sorted(FIELDS)), st.sampled_from(["=", "!=", ">", "<", ">=", "<=", ":"]), VALUES)
def test_no_value_crashes_a_field_or_the_database(catalog, field, operator, value):
    where = f'{field}{operator}"{value.replace(chr(34), "")}"'
    try:
        selected(catalog, where)
    except QueryError as error:
        assert error.position is None or 0 <= error.position <= len(where)


def test_every_field_is_named_in_the_error():
    with pytest.raises(QueryError) as caught:
        compile_filter({"x": 1})
    assert all(name in str(caught.value) for name in FIELDS)
