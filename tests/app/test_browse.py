"""The browse page and what it asks the catalog: months, folders, cameras, places, albums, tags, duplicates."""

import pytest
from PIL import Image

from app import state
from indexer import browse
from tests.app.test_library_page import finish
from tests.app.test_pages import (  # fixtures among them
    button,
    draw_photo,
    empty_library,  # noqa: F401
    folder,  # noqa: F401
    html,
    library,  # noqa: F401
    open_page,
    photos,
)


def opened(**query):
    """The browse page at an address."""
    app = open_page("browse")
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def links(app) -> dict[str, str]:
    return {link.proto.label: link.proto.query_string for link in app.get("page_link")}


# -- what the catalog says ----------------------------------------------------------------------------------


def test_months_come_latest_first_and_undated_photos_last(library):  # noqa: F811
    found = [(group.key, group.photos) for group in browse.months(library.catalog)]
    assert found == [("2023-06", 1), (browse.UNDATED, 2)]


def test_every_group_counts_what_its_filter_finds(library, folder):  # noqa: F811
    library.tag(folder / "sea.png", ["holiday", 'the "sea"'])
    library.create_album("Best of")
    library.add_to_album("Best of", folder / "rose.png")
    library.set_favourite(folder / "rose.png")
    ways = (browse.months, browse.folders, browse.cameras, browse.places, browse.albums, browse.tags)
    groups = [group for way in ways for group in way(library.catalog)] + [browse.favourites(library.catalog)]
    assert len(groups) == 9
    for group in groups:
        assert browse.count(library.catalog, group.where) == group.photos, group
        assert group.cover in browse.photos(library.catalog, group.where, 10)


def test_folders_add_up_what_lies_below_them():
    held = [browse._folder(path, count, 1) for path, count in (("/a", 1), ("/a/b", 2), ("/a/b/c", 3), ("/ab", 9))]
    assert [(group.key, group.photos) for group in browse.subfolders(held, "/a")] == [("/a/b", 5)]
    assert browse.folder_of(held, "/a").photos == 6
    assert browse.folder_of(held, "/nowhere") is None


def test_photos_that_are_gone_are_in_no_group(library, folder):  # noqa: F811
    (folder / "rose.png").unlink()
    library.index(folder, workers=0)
    assert [group.key for group in browse.months(library.catalog)] == [browse.UNDATED]
    assert not browse.cameras(library.catalog)
    assert not browse.places(library.catalog)
    assert browse.folders(library.catalog)[0].photos == 2


def test_photos_near_each_other_are_one_place(library, tmp_path):  # noqa: F811
    for at, (degrees, minutes) in enumerate(((52, 31), (52, 32), (48, 51))):
        exif = Image.Exif()
        exif[0x8825] = {1: "N", 2: (float(degrees), float(minutes), 0.0), 3: "W", 4: (13.0, 24.0, 0.0)}
        draw_photo(tmp_path / "photos" / f"west-{at}.png", (9 * at, 1, 1), exif=exif)
    library.index(tmp_path / "photos", workers=0)
    assert [group.photos for group in browse.places(library.catalog)] == [2, 1, 1], "13 degrees west and east differ"


# -- the page -----------------------------------------------------------------------------------------------


def test_timeline_opens_a_month_and_leads_into_the_search(library):  # noqa: F811
    app = opened()
    assert "by=months&key=2023-06" in links(app)["June 2023"]
    app = opened(by="months", key="2023-06")
    assert photos(app) == ["rose.png"]
    assert app.subheader[0].value == "June 2023"
    assert "where=taken%3D%222023-06%22" in links(app)["Search in these"]


def test_folder_shows_its_folders_and_its_photos(library, folder):  # noqa: F811
    (folder / "deep").mkdir()
    draw_photo(folder / "deep" / "snow.png", (250, 250, 250))
    library.index(folder, workers=0)
    app = opened(by="folders")
    assert "deep" in links(app)
    assert len([name for name in photos(app) if name.endswith(".png")]) == 4


@pytest.mark.parametrize(
    ("by", "said"),
    [("albums", "no albums"), ("tags", "no tags"), ("favourites", "no favourites")],
)
def test_way_without_photos_says_how_to_begin(library, by, said):  # noqa: F811
    assert said in opened(by=by).info[0].value


def test_favourites_tags_and_albums_open_their_photos(library, folder):  # noqa: F811
    library.set_favourite(folder / "sea.png")
    library.tag(folder / "meadow.png", "grass")
    library.create_album("Red")
    library.add_to_album("Red", folder / "rose.png")
    assert photos(opened(by="favourites")) == ["sea.png"]
    assert photos(opened(by="tags", key="grass")) == ["meadow.png"]
    assert photos(opened(by="albums", key="Red")) == ["rose.png"]
    assert photos(opened(by="cameras", key="Acme One")) == ["rose.png"]


def test_places_are_named_by_their_degrees(library):  # noqa: F811
    assert "52.52° N, 13.40° E" in {label.replace("\\", "") for label in links(opened(by="places"))}


def test_grid_has_pages_and_the_address_knows_which(library, folder):  # noqa: F811
    for at in range(50):
        draw_photo(folder / f"many-{at:02}.png", (at, 2 * at, 90))
    library.index(folder, workers=0)
    first = photos(opened(by="months", key=browse.UNDATED))
    second = photos(opened(by="months", key=browse.UNDATED, page="2"))
    assert (len(first), len(second)) == (48, 4)
    assert not set(first) & set(second)
    assert photos(opened(by="months", key=browse.UNDATED, page="99")) == second, "the last page there is"


@pytest.mark.parametrize("key", ["2023-99", 'x" OR year=2023 OR file="', "../../etc", "9" * 400])
@pytest.mark.parametrize("by", ["months", "folders", "tags", "places"])
def test_address_that_means_nothing_is_a_sentence(library, by, key):  # noqa: F811
    app = opened(by=by, key=key)
    assert not photos(app)
    assert len(app.error) + len(app.info) == 1


def test_duplicates_stand_side_by_side_with_the_best_marked(library, folder):  # noqa: F811
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "copy.png").write_bytes(before[folder / "rose.png"])
    library.index(folder, workers=0)
    app = button(opened(by="duplicates"), "Look for duplicates").click().run()
    finish(app, "duplicates")
    assert state.task("duplicates").look().phase == "done"
    drawn = html(app)
    assert str(folder / "copy.png") in drawn
    assert str(folder / "rose.png") in drawn
    assert ">best<" in drawn
    assert all(path.read_bytes() == content for path, content in before.items()), "nothing is deleted"
