"""A catalog as an earlier photoblip left it: made by the migrations up to a revision, with the same rows."""

import sqlite3
from contextlib import closing

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

import indexer


def turn_back(file, revision):
    """Put a closed catalog back to a revision; what only newer ones know is lost."""
    old = file.with_name("old.sqlite")
    config = Config()
    config.set_main_option("script_location", f"{indexer.__path__[0]}/migrations")
    engine = create_engine(f"sqlite:///{old}")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.commit()
    engine.dispose()
    with closing(sqlite3.connect(old)) as connection:
        connection.execute("ATTACH ? AS new", (str(file),))
        for (table,) in connection.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'").fetchall():
            if table != "alembic_version":
                columns = ", ".join(row[1] for row in connection.execute(f"PRAGMA main.table_info({table})"))
                connection.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}")
        connection.commit()
    for leftover in file.parent.glob(f"{file.name}*"):
        leftover.unlink()
    old.rename(file)
