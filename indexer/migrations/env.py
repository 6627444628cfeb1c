"""Alembic's environment: runs on the connection that `indexer.catalog` hands over."""

from alembic import context

from indexer.schema import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("migrations run when a library is opened; to write one see CONTRIBUTING.md")
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
