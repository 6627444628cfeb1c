"""Full text knows what people wrote from what models wrote.

`photo_texts` has a column more: captions and tags of models stand in `written`, no longer among people's, since search
trusts them less. Else it is as revision 0004 made it, which a catalog on its way here has run: nothing of that changes.

Revision: 0005, after 0004
"""

from alembic import op

from indexer.migrations.versions import v0004_full_text
from indexer.migrations.versions.v0004_full_text import BOTH, NAME, SURE, changed

revision = "0005"
down_revision = "0004"

TRIGGERS = v0004_full_text.TRIGGERS | {
    "tags_update": ("UPDATE ON tags", changed("photo_id", "name", "source"), BOTH),
}
OWN = "t.source != 'generated'"
ROW = f"""
    SELECT
        p.id,
        p.title,
        (SELECT group_concat(c.text, char(10)) FROM captions c WHERE c.photo_id = p.id AND c.source = 'user'),
        (SELECT group_concat(t.name, char(10)) FROM tags t WHERE t.photo_id = p.id AND {OWN}),
        (SELECT group_concat({NAME}, char(10)) FROM files f WHERE f.photo_id = p.id AND f.missing_since IS NULL),
        (SELECT group_concat(said, char(10)) FROM (
            SELECT c.text AS said FROM captions c WHERE c.photo_id = p.id AND c.source != 'user' AND {SURE}
            UNION ALL SELECT t.name FROM tags t WHERE t.photo_id = p.id AND NOT ({OWN})
        ))
    FROM photos p
"""
FILL = f"INSERT INTO photo_texts (rowid, title, captions, tags, names, written) {ROW}"


def renew(which: str) -> str:
    """Statements that make the rows of these photos anew."""
    return f"DELETE FROM photo_texts WHERE rowid IN ({which}); {FILL} WHERE p.id IN ({which});"


def upgrade() -> None:
    for name in TRIGGERS:
        op.execute(f"DROP TRIGGER photo_texts_{name}")
    op.execute("DROP TABLE photo_texts")
    op.execute(
        "CREATE VIRTUAL TABLE photo_texts USING fts5"
        "(title, captions, tags, names, written, tokenize = 'porter unicode61 remove_diacritics 2')"
    )
    op.execute(FILL)
    for name, (event, condition, which) in TRIGGERS.items():
        when = f"WHEN {condition}" if condition else ""
        op.execute(f"CREATE TRIGGER photo_texts_{name} AFTER {event} {when} BEGIN {renew(which)} END")
