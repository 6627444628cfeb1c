"""Full text keeps what models wrote apart from what people wrote.

`written_texts` takes the captions and tags of models; `photo_texts` holds what people wrote, and names, undiluted by
the others. Both are made anew by the triggers of revision 0004, which a catalog on its way here has run: nothing of it
changes.

Revision: 0005, after 0004
"""

from alembic import op

from indexer.migrations.versions import v0004_full_text
from indexer.migrations.versions.v0004_full_text import BOTH, NAME, SURE, changed

revision = "0005"
down_revision = "0004"

ROW = f"""
    SELECT
        p.id,
        p.title,
        (SELECT group_concat(c.text, char(10)) FROM captions c WHERE c.photo_id = p.id AND c.source = 'user'),
        (SELECT group_concat(t.name, char(10)) FROM tags t WHERE t.photo_id = p.id AND t.source != 'generated'),
        (SELECT group_concat({NAME}, char(10)) FROM files f WHERE f.photo_id = p.id AND f.missing_since IS NULL)
    FROM photos p
"""
WRITTEN = f"""
    SELECT
        p.id,
        (SELECT group_concat(c.text, char(10)) FROM captions c
            WHERE c.photo_id = p.id AND c.source != 'user' AND {SURE}) AS captions,
        (SELECT group_concat(t.name, char(10)) FROM tags t WHERE t.photo_id = p.id AND t.source = 'generated') AS tags
    FROM photos p WHERE captions IS NOT NULL OR tags IS NOT NULL
"""
FILL = f"INSERT INTO photo_texts (rowid, title, captions, tags, names) {ROW}"
FILL_WRITTEN = f"INSERT INTO written_texts (rowid, captions, tags) SELECT * FROM ({WRITTEN})"
TRIGGERS = v0004_full_text.TRIGGERS | {
    "tags_update": ("UPDATE ON tags", changed("photo_id", "name", "source"), BOTH),
}


def renew(which: str, *, written: bool) -> str:
    """Statements that make the rows of these photos anew, where asked also those of what models wrote."""
    own = f"DELETE FROM photo_texts WHERE rowid IN ({which}); {FILL} WHERE p.id IN ({which});"
    models = f"DELETE FROM written_texts WHERE rowid IN ({which}); {FILL_WRITTEN} WHERE id IN ({which});"
    return own + (models if written else "")


def upgrade() -> None:
    for name in TRIGGERS:
        op.execute(f"DROP TRIGGER photo_texts_{name}")
    op.execute("DROP TABLE photo_texts")
    for name, columns in (("photo_texts", "title, captions, tags, names"), ("written_texts", "captions, tags")):
        tokenizer = "porter unicode61 remove_diacritics 2"
        op.execute(f"CREATE VIRTUAL TABLE {name} USING fts5({columns}, tokenize = '{tokenizer}')")
    op.execute(FILL)
    op.execute(FILL_WRITTEN)
    for name, (event, condition, which) in TRIGGERS.items():
        when = f"WHEN {condition}" if condition else ""
        statements = renew(which, written=name.startswith(("captions", "tags")))  # no file and no folder changes it
        op.execute(f"CREATE TRIGGER photo_texts_{name} AFTER {event} {when} BEGIN {statements} END")
