"""Walking: what counts as a photo, what is left out, and every obstacle as a problem instead of an end."""

import os
import sys
from pathlib import Path

import pytest

from indexer import scan
from indexer.errors import UnreadablePhoto
from indexer.scan import ScannedFile, ScanProblem, stat_file, walk


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def photos(root: Path) -> list[str]:
    """The scanned paths relative to root; fails on any problem."""
    found = list(walk(root))
    assert all(isinstance(item, ScannedFile) for item in found), found
    return [Path(item.path).relative_to(root).as_posix() for item in found]


def problems(root: Path) -> dict[str, str]:
    """Path relative to root -> reason."""
    found = [item for item in walk(root) if isinstance(item, ScanProblem)]
    assert all(item.detail and item.reason in UnreadablePhoto.REASONS for item in found)
    return {os.path.relpath(item.path, root): item.reason for item in found}


def test_photos_come_depth_first_in_the_order_of_their_names(tmp_path):
    make(tmp_path, "b.jpg", "a/z.png", "a/b/y.HEIC", "c.webp", "a.jpg", "d/x.tiff")
    assert photos(tmp_path) == ["a/b/y.HEIC", "a/z.png", "a.jpg", "b.jpg", "c.webp", "d/x.tiff"]
    assert list(walk(tmp_path)) == list(walk(str(tmp_path)))


def test_a_scanned_file_carries_its_absolute_path_size_and_times(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    found = Path("a.jpg").stat()
    expected = ScannedFile(str(tmp_path / "a.jpg"), 5, found.st_mtime_ns, found.st_ctime_ns)
    assert list(walk(".")) == [expected]
    assert stat_file(tmp_path / "a.jpg") == expected


def test_only_files_with_a_photo_suffix_count(tmp_path):
    make(tmp_path, "a.JPG", "b.jpeg", "c.txt", "d.mp4", "e.jpg.part", "jpg", "f.xmp", ".hidden.png")
    assert photos(tmp_path) == [".hidden.png", "a.JPG", "b.jpeg"]


def test_system_and_hidden_folders_and_the_files_of_macos_are_left_out(tmp_path):
    skipped = ["@eaDir", "node_modules", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".git", ".thumbnails.jpg"]
    skipped.append("System Volume Information")
    make(tmp_path, *(f"{name}/a.jpg" for name in skipped), "._b.jpg", "c.jpg")
    assert photos(tmp_path) == ["c.jpg"]


def test_a_hidden_folder_that_was_asked_for_is_walked(tmp_path):
    make(tmp_path, ".private/a.jpg")
    assert photos(tmp_path / ".private") == ["a.jpg"]


def test_a_folder_named_like_a_photo_is_walked(tmp_path):
    make(tmp_path, "holiday.jpg/a.jpg")
    assert photos(tmp_path) == ["holiday.jpg/a.jpg"]


def test_a_single_photo_may_be_walked(tmp_path):
    make(tmp_path, "a.jpg", "b.txt", "._c.jpg")
    assert [item.path for item in walk(tmp_path / "a.jpg")] == [str(tmp_path / "a.jpg")]
    assert [item.path for item in walk(tmp_path / "._c.jpg")] == [str(tmp_path / "._c.jpg")]
    assert problems(tmp_path / "b.txt") == {".": "not-an-image"}


def test_a_root_that_is_not_there_is_reported_as_vanished(tmp_path):
    assert problems(tmp_path / "gone") == {".": "vanished"}


def test_links_to_files_and_folders_are_followed(tmp_path):
    make(tmp_path, "elsewhere/a.jpg", "elsewhere/sub/b.jpg", "root/c.jpg")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "d.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    assert photos(tmp_path / "root") == ["c.jpg", "d.jpg", "folder/a.jpg", "folder/sub/b.jpg"]


def test_a_folder_reached_twice_is_walked_once(tmp_path):
    make(tmp_path, "a/x.jpg")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert photos(tmp_path) == ["a/x.jpg"]


def test_a_link_to_a_parent_folder_is_reported_and_the_walk_goes_on(tmp_path):
    make(tmp_path, "a/b/x.jpg", "a/b/z.jpg")
    (tmp_path / "a" / "b" / "y").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b" / "self").symlink_to(tmp_path / "a" / "b")
    found = list(walk(tmp_path))
    assert problems(tmp_path) == {"a/b/y": "symlink-loop", "a/b/self": "symlink-loop"}
    names = [Path(item.path).name for item in found if isinstance(item, ScannedFile)]
    assert names == ["x.jpg", "z.jpg"]


def test_links_that_point_at_each_other_are_reported(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "c").symlink_to(tmp_path / "c")
    assert problems(tmp_path) == dict.fromkeys(("a.jpg", "b.jpg", "c"), "symlink-loop")
    with pytest.raises(UnreadablePhoto) as caught:
        stat_file(tmp_path / "a.jpg")
    assert caught.value.reason == "symlink-loop"


def test_a_dangling_link_is_reported_where_it_looks_like_a_photo(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "folder").symlink_to(tmp_path / "gone")
    assert problems(tmp_path) == {"a.jpg": "vanished"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_named_like_a_photo_is_reported_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "b.txt")
    assert problems(tmp_path) == {"a.jpg": "not-an-image"}
    with pytest.raises(UnreadablePhoto) as caught:
        stat_file(tmp_path / "a.jpg")
    assert caught.value.reason == "not-an-image"


def badly_named(folder: Path, name: bytes) -> Path:
    path = folder / os.fsdecode(name)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return path


def test_a_name_that_is_not_utf8_is_reported_in_printable_form(tmp_path):
    path = badly_named(tmp_path, b"caf\xe9.jpg")
    badly_named(tmp_path, b"caf\xe9.txt")
    make(tmp_path, "good.jpg")
    good, problem = sorted(walk(tmp_path), key=lambda item: isinstance(item, ScanProblem))
    assert good.path == str(tmp_path / "good.jpg")
    assert (problem.path, problem.reason) == (str(tmp_path / r"caf\xe9.jpg"), "bad-name")
    assert "rename" in problem.detail
    problem.path.encode("utf-8")
    with pytest.raises(UnreadablePhoto) as caught:
        stat_file(path)
    assert caught.value.reason == "bad-name"


def test_a_folder_with_a_bad_name_is_reported_once(tmp_path):
    badly_named(tmp_path, b"\xff/a.jpg")
    badly_named(tmp_path, b"\xff/b.jpg")
    assert problems(tmp_path) == {r"\xff": "bad-name"}


def refusing(real, name: str):
    """real, but with PermissionError for every path that ends in name: works as root too."""

    def look(path, *rest, **options):
        if os.fspath(path).endswith(name):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **options)

    return look


def test_a_folder_that_may_not_be_listed_is_reported_and_the_walk_goes_on(tmp_path, monkeypatch):
    make(tmp_path, "a/x.jpg", "b/y.jpg", "c.jpg")
    monkeypatch.setattr(scan.os, "scandir", refusing(os.scandir, "/a"))
    assert problems(tmp_path) == {"a": "permission"}
    names = [Path(item.path).name for item in walk(tmp_path) if isinstance(item, ScannedFile)]
    assert names == ["y.jpg", "c.jpg"]


def test_a_file_whose_stat_is_refused_is_reported(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg", "b.jpg")
    monkeypatch.setattr(scan.os, "stat", refusing(os.stat, "a.jpg"))
    assert problems(tmp_path) == {"a.jpg": "permission"}
    with pytest.raises(UnreadablePhoto) as caught:
        stat_file(str(tmp_path / "a.jpg"))
    assert caught.value.reason == "permission"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permission bits do not bind root or Windows"
)
def test_a_folder_without_permission_bits_is_reported(tmp_path):
    make(tmp_path, "a/x.jpg", "b.jpg")
    (tmp_path / "a").chmod(0)
    try:
        assert problems(tmp_path) == {"a": "permission"}
    finally:
        (tmp_path / "a").chmod(0o700)


def test_a_folder_that_goes_away_before_its_turn_is_passed_over(tmp_path):
    make(tmp_path, "a.jpg", "b/x.jpg")
    steps = walk(tmp_path)
    assert next(steps).path.endswith("a.jpg")
    (tmp_path / "b" / "x.jpg").unlink()
    (tmp_path / "b").rmdir()
    assert list(steps) == []


def test_a_photo_that_goes_away_during_the_walk_is_reported_as_vanished(tmp_path):
    make(tmp_path, "a.jpg", "b.jpg")
    steps = walk(tmp_path)
    next(steps)
    (tmp_path / "b.jpg").unlink()
    assert next(steps).reason == "vanished"


def test_a_folder_that_goes_away_while_it_is_opened_is_reported_as_vanished(tmp_path, monkeypatch):
    make(tmp_path, "a/x.jpg", "b.jpg")
    real = os.scandir

    def gone(path):
        return real(path + "-gone" if path.endswith("/a") else path)

    monkeypatch.setattr(scan.os, "scandir", gone)
    assert problems(tmp_path) == {"a": "vanished"}


def test_a_tree_deeper_than_the_recursion_limit_is_walked(tmp_path):
    folders = [str(tmp_path)]
    for _ in range(sys.getrecursionlimit() + 100):
        folders.append(folders[-1] + "/d")
    if len(folders[-1]) > 4000:
        pytest.skip("the paths would be longer than the system takes")
    for folder in folders[1:]:
        Path(folder).mkdir()
    photo = Path(folders[-1]) / "a.jpg"
    photo.write_bytes(b"x")
    try:
        assert [item.path for item in walk(tmp_path)] == [str(photo)]
    finally:  # pytest's own clean-up is recursive
        photo.unlink()
        for folder in reversed(folders[1:]):
            Path(folder).rmdir()
