"""Full text over captions, titles, tags, names of files and folders.

A row of `photo_texts` is made anew by a trigger whenever something that it holds changes, in the same transaction: no
writer has to think of it. It holds the captions of people and those of models that the matching model believes
(0.3 or more, as catalog.SURE_CAPTION), all tags, and the paths of files that are there, from the name of the indexed
folder on: what stands above it says nothing about a photo.

Revision: 0004, after 0003
"""

from alembic import op

revision = "0004"
down_revision = "0003"

SURE = "(c.source = 'user' OR c.score IS NULL OR c.score >= 0.3)"
# the path from the last name of the outermost indexed folder on; rtrim cuts that name off the folder's path
NAME = """substr(f.path, 1 + coalesce((
    SELECT min(length(rtrim(r.path, replace(r.path, '/', '')))) FROM roots r
    WHERE f.path >= rtrim(r.path, '/') || '/' AND f.path < rtrim(r.path, '/') || '0'
), 0))"""
ROW = f"""
    SELECT
        p.id,
        p.title,
        (SELECT group_concat(c.text, char(10)) FROM captions c WHERE c.photo_id = p.id AND {SURE}),
        (SELECT group_concat(t.name, char(10)) FROM tags t WHERE t.photo_id = p.id),
        (SELECT group_concat({NAME}, char(10)) FROM files f WHERE f.photo_id = p.id AND f.missing_since IS NULL)
    FROM photos p
"""
FILL = f"INSERT INTO photo_texts (rowid, title, captions, tags, names) {ROW}"


def renew(which: str) -> str:
    """Statements that make the rows of these photos anew."""
    return f"DELETE FROM photo_texts WHERE rowid IN ({which}); {FILL} WHERE p.id IN ({which});"


def changed(*columns: str) -> str:
    return " OR ".join(f"old.{column} IS NOT new.{column}" for column in columns)


BELOW = "SELECT photo_id FROM files WHERE path >= rtrim({0}.path, '/') || '/' AND path < rtrim({0}.path, '/') || '0'"
BOTH = "SELECT old.photo_id UNION SELECT new.photo_id"
TRIGGERS = {
    "photos_insert": ("INSERT ON photos", "", "SELECT new.id"),
    "photos_update": ("UPDATE OF title ON photos", changed("title"), "SELECT new.id"),
    "photos_delete": ("DELETE ON photos", "", "SELECT old.id"),
    "captions_insert": ("INSERT ON captions", "", "SELECT new.photo_id"),
    "captions_update": ("UPDATE ON captions", changed("photo_id", "text", "source", "score"), BOTH),
    "captions_delete": ("DELETE ON captions", "", "SELECT old.photo_id"),
    "tags_insert": ("INSERT ON tags", "", "SELECT new.photo_id"),
    "tags_update": ("UPDATE ON tags", changed("photo_id", "name"), BOTH),
    "tags_delete": ("DELETE ON tags", "", "SELECT old.photo_id"),
    "files_insert": ("INSERT ON files", "", "SELECT new.photo_id"),
    "files_update": ("UPDATE ON files", changed("photo_id", "path", "missing_since"), BOTH),
    "files_delete": ("DELETE ON files", "", "SELECT old.photo_id"),
    "roots_insert": ("INSERT ON roots", "", BELOW.format("new")),
    "roots_update": ("UPDATE ON roots", changed("path"), f"{BELOW.format('old')} UNION {BELOW.format('new')}"),
    "roots_delete": ("DELETE ON roots", "", BELOW.format("old")),
}


def upgrade() -> None:
    op.execute(
        "CREATE VIRTUAL TABLE photo_texts USING fts5"
        "(title, captions, tags, names, tokenize = 'porter unicode61 remove_diacritics 2')"
    )
    op.execute(FILL)
    for name, (event, condition, which) in TRIGGERS.items():
        when = f"WHEN {condition}" if condition else ""
        op.execute(f"CREATE TRIGGER photo_texts_{name} AFTER {event} {when} BEGIN {renew(which)} END")
