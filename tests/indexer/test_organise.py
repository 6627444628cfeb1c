"""Albums, tags, favourites, ratings, titles and saved searches: they hang on the photo, which is its content."""

import pytest
from PIL import Image, PngImagePlugin
from sqlalchemy import text

from indexer.catalog import Catalog
from indexer.errors import LibraryError, PhotoNotFound, QueryError
from indexer.schema import fold
from tests.indexer.conftest import paint
from tests.indexer.old_catalogs import turn_back


@pytest.fixture
def ids(library, photos):
    """The four photos' ids by colour."""
    return {path.stem: library.photo_id(path) for path in photos.iterdir()}


# -- tags ---------------------------------------------------------------------------------------------------


def test_a_tag_is_found_whatever_its_case_and_spacing(library, ids):
    assert library.tag([ids["red"], ids["blue"]], "  Summer   2019 ") == 2
    assert library.tag(ids["red"], "summer 2019") == 0
    assert library.tags() == [{"name": "Summer 2019", "photos": 2, "user": 2, "file": 0, "generated": 0}]
    assert library.untag(ids["blue"], "SUMMER 2019") == 1
    assert [tag["name"] for tag in library.photo(ids["red"])["tags"]] == ["Summer 2019"]
    assert library.photo(ids["blue"])["tags"] == []


def test_several_photos_get_several_tags_by_id_or_path(library, ids, photos):
    assert library.tag([photos / "red.png", str(ids["green"])], ["wall", "paint"]) == 4
    assert {tag["name"]: tag["photos"] for tag in library.tags()} == {"paint": 2, "wall": 2}


def test_an_unknown_photo_tags_none_of_the_others(library, ids):
    with pytest.raises(PhotoNotFound, match="no photo 999"):
        library.tag([ids["red"], 999], "wall")
    assert library.tags() == []


@pytest.mark.parametrize("name", ["", "  \n ", "\0\x07", "x" * 101])
def test_a_tag_without_a_usable_name_is_refused(library, ids, name):
    with pytest.raises(LibraryError, match=r"a tag"):
        library.tag(ids["red"], name)


def test_folding_is_unicode_wide():
    assert fold("STRASSE") == fold("Straße") and fold("Ｃａｆé") == fold("café") and fold("Café") == fold("Cafe\u0301")


# -- albums -------------------------------------------------------------------------------------------------


def test_an_album_holds_photos_in_the_order_they_came(library, ids):
    library.create_album("Holidays")
    assert library.add_to_album("holidays", [ids["red"], ids["green"]]) == 2
    assert library.add_to_album("Holidays", [ids["green"], ids["blue"]]) == 1
    assert sorted(library.album("HOLIDAYS")) == sorted(ids[name] for name in ("red", "green", "blue"))
    assert library.remove_from_album("Holidays", ids["red"]) == 1
    (row,) = library.albums()
    assert (row["name"], row["photos"], row["missing"]) == ("Holidays", 2, 0)
    assert library.photo(ids["green"])["albums"] == ["Holidays"]


def test_an_album_can_be_renamed_and_taken_apart_and_its_photos_stay(library, ids):
    library.create_album("one")
    library.create_album("two")
    library.add_to_album("one", list(ids.values()))
    with pytest.raises(LibraryError, match="'two' already"):
        library.rename_album("one", "TWO")
    library.rename_album("one", "One")  # its own name in another case
    library.rename_album("one", "three")
    assert library.delete_album("three") == 4 and [row["name"] for row in library.albums()] == ["two"]
    assert library.status()["photos"] == 4


def test_albums_that_are_not_there_are_errors_with_a_way_out(library, ids):
    for call in (
        lambda: library.album("x"),
        lambda: library.add_to_album("x", ids["red"]),
        lambda: library.remove_from_album("x", ids["red"]),
        lambda: library.rename_album("x", "y"),
        lambda: library.delete_album("x"),
    ):
        with pytest.raises(LibraryError, match=r"no album .x..*album list"):
            call()
    library.create_album("x")
    with pytest.raises(LibraryError, match="'x' already"):
        library.create_album("X")


# -- favourites, ratings, titles ----------------------------------------------------------------------------


def test_favourites_ratings_and_titles_stay_with_the_photo(library, ids):
    library.set_favourite([ids["red"], ids["blue"]])
    library.set_favourite(ids["blue"], False)
    library.rate([ids["red"]], 4)
    library.set_title(ids["red"], "  A\nwall ")
    photo = library.photo(ids["red"])
    assert (photo["favourite"], photo["rating"], photo["title"]) == (True, 4, "A wall")
    assert not library.photo(ids["blue"])["favourite"]
    library.rate(ids["red"], None)
    library.set_title(ids["red"], " ")
    assert (library.photo(ids["red"])["rating"], library.photo(ids["red"])["title"]) == (None, None)


@pytest.mark.parametrize("stars", [-1, 6, 2.5, True])
def test_a_rating_is_nought_to_five_stars(library, ids, stars):
    with pytest.raises(LibraryError, match="0 to 5"):
        library.rate(ids["red"], stars)


def test_a_moved_file_keeps_everything(library, ids, photos):
    red = ids["red"]
    library.create_album("walls")
    library.add_to_album("walls", red)
    library.tag(red, "wall")
    library.rate(red, 5)
    library.set_favourite(red)
    library.set_title(red, "The wall")
    (photos / "deep" / "er").mkdir(parents=True)
    (photos / "red.png").rename(photos / "deep" / "er" / "other name.png")
    library.index(photos, workers=0)
    photo = library.photo(photos / "deep" / "er" / "other name.png")
    assert photo["id"] == red and photo["albums"] == ["walls"] and [tag["name"] for tag in photo["tags"]] == ["wall"]
    assert (photo["rating"], photo["favourite"], photo["title"]) == (5, True, "The wall")


def test_a_vanished_photo_keeps_its_place_in_the_album_and_comes_back(library, ids, photos):
    library.create_album("walls")
    library.add_to_album("walls", [ids["red"], ids["blue"]])
    content = (photos / "red.png").read_bytes()
    (photos / "red.png").unlink()
    library.index(photos, workers=0)
    (row,) = library.albums()
    assert library.album("walls") == [ids["blue"]] and (row["photos"], row["missing"]) == (1, 1)
    (photos / "again.png").write_bytes(content)
    library.index(photos, workers=0)
    assert sorted(library.album("walls")) == sorted([ids["red"], ids["blue"]])


# -- saved searches -----------------------------------------------------------------------------------------


def test_a_saved_search_finds_what_it_would_find_now(library, photos):
    library.save_search("Red ones", {"text": "red", "top_k": 2, "where": {"width": 60}})
    assert [row["name"] for row in library.saved_searches()] == ["Red ones"]
    paint(photos / "new.png", (230, 21, 20))
    library.index(photos, workers=0)
    found = [hit.photo_id for hit in library.search(**library.saved_search("red ONES"))]
    assert len(found) == 2 and library.photo_id(photos / "new.png") in found
    library.delete_saved_search("red ones")
    with pytest.raises(LibraryError, match="no saved search 'red ones'"):
        library.saved_search("red ones")


def test_a_saved_search_is_not_replaced_unless_told(library):
    library.save_search("a", {"text": "red"})
    with pytest.raises(LibraryError, match="'a' already"):
        library.save_search("A", {"text": "blue"})
    library.save_search("A", {"text": "blue"}, replace=True)
    assert library.saved_search("a") == {"text": "blue"}


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"colour": "red"}, "'colour'"),
        ({"image": Image.new("RGB", (2, 2))}, "as paths"),
        ({"text": float("nan")}, "cannot be saved"),
    ],
)
def test_a_search_that_cannot_be_kept_is_refused(library, query, words):
    with pytest.raises(QueryError, match=words):
        library.save_search("a", query)


# -- what files say themselves ------------------------------------------------------------------------------

XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="3">
<dc:title><rdf:Alt><rdf:li xml:lang="de">Der Hafen</rdf:li><rdf:li xml:lang="x-default">The harbour</rdf:li></rdf:Alt>
</dc:title><dc:subject><rdf:Bag><rdf:li>boat</rdf:li><rdf:li> Sea </rdf:li><rdf:li>sea</rdf:li></rdf:Bag></dc:subject>
</rdf:Description></rdf:RDF></x:xmpmeta>"""


def test_a_files_own_title_keywords_and_rating_come_in_with_it(library, photos):
    Image.new("RGB", (50, 40), "white").save(photos / "harbour.jpg", xmp=XMP.encode())
    text_chunk = PngImagePlugin.PngInfo()
    text_chunk.add_itxt("XML:com.adobe.xmp", XMP)
    Image.new("RGB", (50, 41), "white").save(photos / "harbour.png", pnginfo=text_chunk)
    library.index(photos, workers=0)
    for name in ("harbour.jpg", "harbour.png"):
        photo = library.photo(photos / name)
        assert (photo["title"], photo["rating"]) == ("The harbour", 3)
        assert [(tag["name"], tag["source"]) for tag in photo["tags"]] == [("boat", "file"), ("Sea", "file")]
    assert library.tags()[0] == {"name": "boat", "photos": 2, "user": 0, "file": 2, "generated": 0}


def test_what_the_user_says_is_not_overwritten_by_the_file(library, photos):
    path = photos / "harbour.jpg"
    Image.new("RGB", (50, 40), "white").save(path, xmp=XMP.encode())
    library.index(photos, workers=0)
    library.set_title(path, "Mine")
    library.rate(path, 1)
    library.untag(path, "boat")
    path.rename(photos / "moved.jpg")
    library.index(photos, workers=0)
    photo = library.photo(photos / "moved.jpg")
    assert (photo["title"], photo["rating"]) == ("Mine", 1)
    assert [tag["name"] for tag in photo["tags"]] == ["Sea"]


# -- libraries from before ----------------------------------------------------------------------------------


def test_a_library_from_before_albums_keeps_everything(library, open_library, photos):
    library.add_caption(photos / "red.png", "a wall")
    tables = ("files", "embeddings", "captions", "roots", "jobs", "models", "state")

    def contents(catalog):
        with catalog.reading() as connection:
            found = {table: connection.execute(text(f"SELECT * FROM {table}")).all() for table in tables}
            columns = "id, content_hash, bytes, width, height, format, orientation, taken_at, added_at"
            return found | {"photos": connection.execute(text(f"SELECT {columns} FROM photos")).all()}

    before = contents(library.catalog)
    library.close()
    turn_back(library.paths.catalog, "0002")
    for _ in range(2):  # the second time changes nothing
        catalog = Catalog(library.paths.catalog)
        assert contents(catalog) == before and all(before[table] for table in before)
        catalog.close()
    again = open_library()
    photo = again.photo(photos / "red.png")
    assert (photo["title"], photo["favourite"], photo["rating"], photo["tags"]) == (None, False, None, [])
    again.tag(photo["id"], "wall")
    assert again.index(photos, workers=0).unchanged == 4
