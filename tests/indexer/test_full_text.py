"""Words beside the photos: found whatever the embedding makes of them, and level after every writer."""

import shutil
import sqlite3

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import delete, insert, select, text, update

from indexer.catalog import HEAD, SURE_CAPTION, Catalog, now
from indexer.full_text import TABLE, WRITTEN, FullText, having, quoted, subject, words
from indexer.jobs import store_caption
from indexer.migrations.versions import v0005_written_texts as migration
from indexer.organise import tag, untag
from indexer.schema import Caption, File, Photo, Root, Tag
from tests.indexer.conftest import COLOURS, paint


def add_photo(connection, photo_id, path, **values):
    common = {"content_hash": str(photo_id), "bytes": 1, "width": 1, "height": 1, "format": "PNG", "orientation": 1}
    connection.execute(insert(Photo).values(id=photo_id, added_at=now(), **common, **values))
    connection.execute(insert(File).values(photo_id=photo_id, path=path, size=1, mtime_ns=1))


def add_caption(catalog, photo_id, words):
    with catalog.transaction() as connection:
        store_caption(connection, photo_id, words, None, None)


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite")
    with catalog.transaction() as connection:
        connection.execute(insert(Root).values(path="/home/me/Pictures", added_at=now()))
        add_photo(connection, 1, "/home/me/Pictures/2023 Italy/IMG_1234-sunset.jpg")
        add_photo(connection, 2, "/home/me/Pictures/Müller & söhne/b.jpg", title="Grandma's birthday")
        add_photo(connection, 3, "/home/me/Pictures/c.jpg")
    yield catalog
    catalog.close()


EVERY = np.arange(1, 100)


def found(catalog, line, k=10, among=EVERY):
    lists = [FullText(catalog, name).search(line, k, among).ids.tolist() for name in (TABLE, WRITTEN)]
    return [*lists[0], *lists[1]]


def is_level(catalog):
    """Whether the table holds what it would hold if it were made anew."""
    with catalog.reading() as connection:
        for name, fields, made in (
            ("photo_texts", "title, captions, tags, names", migration.ROW),
            ("written_texts", "captions, tags", f"SELECT * FROM ({migration.WRITTEN})"),
        ):
            held = connection.execute(text(f"SELECT rowid, {fields} FROM {name} ORDER BY 1")).all()
            connection.execute(text(f"INSERT INTO {name} ({name}) VALUES ('integrity-check')"))
            if held != connection.execute(text(f"{made} ORDER BY 1")).all():
                return False
    return True


# -- finding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("IMG_1234", [1]),
        ("img 1234", [1]),
        ("italy", [1]),
        ("sunsets", [1]),
        ("a photo of the SUNSET in italy", [1]),
        ("muller", [2]),
        ("birthdays", [2]),
        ("the birthday in Italy", [1, 2]),
        ("Pictures", [3, 1, 2]),
        ("home", []),
        ("nowhere", []),
        ("", []),
        ("?!", []),
        ("AND", []),
        ('" OR * NEAR(x y) title: - ^', []),
        ("the", []),
    ],
)
def test_words_are_found_by_their_stems_and_rare_ones_count_more(catalog, line, expected):
    assert found(catalog, line) == expected


def test_strength_is_how_much_of_the_query_stands_there(catalog):
    add_caption(catalog, 3, "a red boat at the pier")
    add_caption(catalog, 2, "a boat")
    hits = FullText(catalog).search("red boat pier", 10, EVERY)
    assert hits.ids.tolist() == [3, 2]
    assert 0.7 < hits.strengths[0] < 1.5 and hits.strengths[1] < 0.5 * hits.strengths[0]
    strange = FullText(catalog).search("red boat pier zeppelin", 10, EVERY)
    assert strange.strengths[0] < hits.strengths[0]


def test_what_models_wrote_stands_apart(catalog):
    add_caption(catalog, 1, "a red boat")
    before = FullText(catalog).search("red boat", 10, EVERY)
    with catalog.transaction() as connection:
        store_caption(connection, 1, "a dog runs over a field of high green grass", "model", 0.9)
        store_caption(connection, 2, "a red boat", "model", 0.9)
        store_caption(connection, 3, "the weather is red", "model", 0.9)
        connection.execute(insert(Tag).values(photo_id=3, name="Boat", source="generated", created_at=now()))
    after = FullText(catalog).search("red boat", 10, EVERY)
    assert after.ids.tolist() == [1] and after.strengths.tolist() == before.strengths.tolist(), "nothing is diluted"
    assert FullText(catalog).with_all_words("the red boat", [1, 2, 3]) == {1} and is_level(catalog)
    written = FullText(catalog, WRITTEN)
    assert sorted(written.search("red boat", 10, EVERY).ids) == [2, 3]
    assert [row[0] for row in catalog.rows(having(("red", "boat")))] == [1, 2], (
        "the caption's end and the tag are no phrase"
    )
    with catalog.transaction() as connection:
        connection.execute(update(Tag).values(source="user"))
    assert found(catalog, "boat", among=np.array([3])) == [3] and is_level(catalog)
    with catalog.transaction() as connection:
        connection.execute(delete(Caption))
    assert written.search("red boat", 10, EVERY).ids.size == 0 and is_level(catalog)


def test_only_the_wanted_photos_are_found_and_as_many_as_there_are(catalog):
    for photo_id in (1, 2, 3):
        add_caption(catalog, photo_id, "boat " * photo_id)
    assert found(catalog, "boat", among=np.array([1, 3])) == [3, 1]
    assert len(found(catalog, "boat", k=2)) == 2 and found(catalog, "boat", among=np.array([], np.int64)) == []


def test_words_that_most_photos_have_are_looked_for_beside_rarer_ones_only(catalog, monkeypatch):
    monkeypatch.setattr("indexer.full_text.MAX_MATCHES", 2)
    assert found(catalog, "pictures italy") == [1] and found(catalog, "pictures") == []


@given(st.text(max_size=40))
def test_no_text_is_a_syntax_of_the_index(line):
    index = sqlite3.connect(":memory:")
    index.execute("CREATE VIRTUAL TABLE t USING fts5(a, tokenize = 'porter unicode61')")
    for phrase in ([words(line)] if words(line) else []) + [(word,) for word in subject(line)]:
        assert index.execute("SELECT rowid FROM t WHERE t MATCH ?", (quoted(phrase),)).fetchall() == []
    index.close()


def test_a_phrase_stands_in_one_piece(catalog):
    add_caption(catalog, 3, "The Golden Gate at dawn")
    ids = {phrase: [row[0] for row in catalog.rows(having(words(phrase)))] for phrase in ("golden gate", "gate golden")}
    assert ids == {"golden gate": [3], "gate golden": []}


# -- level with the catalog -----------------------------------------------------------------------------------


def test_a_sure_caption_is_what_the_catalog_shows():
    assert f">= {SURE_CAPTION}" in migration.SURE


def test_captions_come_and_go(catalog):
    add_caption(catalog, 3, "a zeppelin")
    assert found(catalog, "zeppelin") == [3] and is_level(catalog)
    with catalog.transaction() as connection:
        store_caption(connection, 1, "a gondola", "model", 0.9)
        store_caption(connection, 2, "a submarine", "model", 0.1)
    assert found(catalog, "gondola") == [1] and found(catalog, "submarine") == [] and is_level(catalog)
    with catalog.transaction() as connection:
        store_caption(connection, 1, "a canal", "model", 0.9)  # in place of the gondola
        connection.execute(update(Caption).where(Caption.photo_id == 3).values(photo_id=2))
    assert (found(catalog, "gondola"), found(catalog, "canal"), found(catalog, "zeppelin")) == ([], [1], [2])
    with catalog.transaction() as connection:
        connection.execute(update(Caption).where(Caption.source == "generated").values(score=0.2))
        connection.execute(delete(Caption).where(Caption.source == "user"))
    assert found(catalog, "canal") == [] and found(catalog, "zeppelin") == [] and is_level(catalog)


def test_tags_and_titles_come_and_go(catalog):
    tag(catalog, [1, 3], ["Château"])
    assert sorted(found(catalog, "chateau")) == [1, 3] and is_level(catalog)
    untag(catalog, [1], ["château"])
    with catalog.transaction() as connection:
        connection.execute(update(Tag).values(name="castle", folded="castle"))
        connection.execute(update(Photo).where(Photo.id == 2).values(title=None))
        connection.execute(update(Photo).where(Photo.id == 3).values(title="Home again"))
    assert found(catalog, "castle") == [3] and found(catalog, "birthday") == [] and found(catalog, "home") == [3]
    assert is_level(catalog)


def test_a_file_that_moves_is_found_under_its_new_name(catalog):
    with catalog.transaction() as connection:
        moved = update(File).where(File.photo_id == 3).values(path="/home/me/Pictures/Norway/fjord.jpg")
        connection.execute(moved)
    assert found(catalog, "fjord norway") == [3] and found(catalog, "c") == [] and is_level(catalog)


def test_a_missing_file_and_a_forgotten_photo_are_not_found(catalog):
    with catalog.transaction() as connection:
        connection.execute(update(File).where(File.photo_id == 1).values(missing_since=now()))
        connection.execute(delete(File).where(File.photo_id == 3))
        connection.execute(delete(Photo).where(Photo.id == 3))
    assert found(catalog, "italy") == [] and found(catalog, "c") == [] and is_level(catalog)
    with catalog.transaction() as connection:
        connection.execute(update(File).where(File.photo_id == 1).values(missing_since=None))
    assert found(catalog, "italy") == [1] and is_level(catalog)


def test_what_stands_above_the_indexed_folder_is_not_found_until_that_is_indexed_too(catalog):
    assert found(catalog, "me") == []
    with catalog.transaction() as connection:
        connection.execute(insert(Root).values(path="/home/me", added_at=now()))
    assert sorted(FullText(catalog).search("me pictures", 9, EVERY).ids.tolist()) == [1, 2, 3] and is_level(catalog)
    with catalog.transaction() as connection:
        connection.execute(update(Root).where(Root.path == "/home/me").values(path="/mnt"))
    assert found(catalog, "me") == [] and is_level(catalog)
    with catalog.transaction() as connection:
        connection.execute(delete(Root))
    assert sorted(found(catalog, "home")) == [1, 2, 3] and is_level(catalog)


def test_what_a_transaction_takes_back_was_never_there(catalog):
    with pytest.raises(KeyError), catalog.transaction() as connection:
        store_caption(connection, 1, "a zeppelin", None, None)
        raise KeyError
    assert found(catalog, "zeppelin") == [] and is_level(catalog)


def test_a_library_stays_level_through_its_life(library, photos, open_library):
    level = lambda: is_level(library.catalog)  # noqa: E731
    assert level() and library.search("red", rerank=0)[0].text_rank == 1
    library.add_caption(1, "my zeppelin")
    library.caption([1, 2])
    library.tag([1, 2], ["holiday"])
    library.set_title([1], "Airship")
    assert level()
    (photos / "2024").mkdir()
    (photos / "red.png").rename(photos / "2024" / "balloon.png")
    paint(photos / "green.png", (9, 9, 9))
    (photos / "blue.png").unlink()
    library.index(photos, workers=0)
    assert level()
    shutil.copy(photos / "yellow.png", photos / "copy.png")
    library.index(photos, workers=0)
    library.reindex("colours")
    assert level() and library.search("balloon", rerank=0)[0].text_rank == 1


def test_a_library_from_before_gets_its_full_text(library):
    library.add_caption(1, "my zeppelin")
    library.caption([2])
    written = library.photo(2)["captions"][0]["text"]
    with library.catalog.transaction() as connection:
        for name in migration.TRIGGERS:
            connection.execute(text(f"DROP TRIGGER photo_texts_{name}"))
        connection.execute(text("DROP TABLE photo_texts"))
        connection.execute(text("DROP TABLE written_texts"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0003'"))
    library.close()
    for _ in range(2):  # the second time changes nothing
        catalog = Catalog(library.catalog.file)
        assert catalog.scalar(text("SELECT version_num FROM alembic_version")) == HEAD
        assert is_level(catalog) and found(catalog, "zeppelin") == [1]
        assert FullText(catalog, WRITTEN).search(written, 9, EVERY).ids.tolist() == [2]
        assert catalog.rows(select(Photo.id)) and len(COLOURS) == 4
        catalog.close()
