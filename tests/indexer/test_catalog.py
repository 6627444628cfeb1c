"""The catalog's file: migrations match the tables, transactions are whole, newer files are refused."""

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import insert, select, text

import indexer
from indexer.catalog import HEAD, Catalog, chunks, now, under
from indexer.errors import LibraryError
from indexer.schema import Base, File, Photo, Root


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite")
    yield catalog
    catalog.close()


def test_migrations_make_exactly_the_tables(catalog):
    with catalog.engine.connect() as connection:
        opts = {"compare_type": True, "include_name": is_modelled}
        assert compare_metadata(MigrationContext.configure(connection, opts=opts), Base.metadata) == []


def is_modelled(name, kind, _parents) -> bool:
    """The full text is no table of SQLAlchemy's: FTS5 keeps it in several, and triggers fill it."""
    return not (kind == "table" and name.startswith(("photo_texts", "written_texts")))


def test_head_is_the_newest_migration():
    config = Config()
    config.set_main_option("script_location", f"{indexer.__path__[0]}/migrations")
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_a_catalog_of_a_newer_photoblip_is_refused(catalog):
    with catalog.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(LibraryError, match="newer photoblip"):
        Catalog(catalog.file)


def test_a_transaction_is_all_or_nothing(catalog):
    with pytest.raises(KeyError), catalog.transaction() as connection:
        connection.execute(insert(Root).values(path="/a", added_at=now()))
        raise KeyError
    assert catalog.rows(select(Root.path)) == []


def test_a_catalog_that_cannot_be_written_is_one_sentence(catalog):
    with pytest.raises(LibraryError, match="cannot be written"), catalog.transaction() as connection:
        connection.exec_driver_sql("PRAGMA query_only = 1")
        connection.execute(insert(Root).values(path="/a", added_at=now()))


def test_a_catalog_that_another_program_is_bringing_up_to_date_is_said_so(catalog, monkeypatch):
    monkeypatch.setattr("indexer.catalog.PATIENCE", 0.1)
    with catalog.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0003'"))
    with catalog.transaction(), pytest.raises(LibraryError, match="in use by another program"):
        Catalog(catalog.file)


def test_two_processes_may_open_a_new_library_at_once(tmp_path):
    opened, errors = [], []

    def open_it():
        try:
            opened.append(Catalog(tmp_path / "new" / "catalog.sqlite"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(opened) == 6


def test_under_is_the_folder_and_what_lies_below(catalog):
    photo = {"id": 1, "content_hash": "x", "bytes": 1, "width": 1, "height": 1, "format": "PNG", "orientation": 1}
    paths = ["/a/b", "/a/b/c.jpg", "/a/b/c/d.jpg", "/a/bc.jpg", "/a/b.jpg", "/a"]
    with catalog.transaction() as connection:
        connection.execute(insert(Photo).values(**photo, added_at=now()))
        for path in paths:
            connection.execute(insert(File).values(photo_id=1, path=path, size=1, mtime_ns=1))
    for folder in ("/a/b", "/a/b/"):
        found = {row.path for row in catalog.rows(select(File.path).where(under(File.path, folder)))}
        assert found - {"/a/b"} == {"/a/b/c.jpg", "/a/b/c/d.jpg"}


def test_chunks_are_lazy_and_whole():
    source = iter(range(5))
    parts = chunks(source, 2)
    assert next(parts) == [0, 1] and next(source) == 2
    assert list(parts) == [[3, 4]]
