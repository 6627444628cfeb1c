"""The models whose vectors a library holds: how complete each is, which one search uses, and dropping one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import delete, func, select

from indexer.catalog import Catalog, bump_generation, is_present
from indexer.config import LibraryPaths
from indexer.errors import LibraryError, ModelError
from indexer.schema import Embedding, Model, Photo


@dataclass(frozen=True)
class HeldModel:
    """A model's vectors in a library.

    Attributes:
        id: of the catalog's row. photos: how many of the photos on disk have vectors. missing: how many have none.
    """

    id: int
    name: str
    fingerprint: str
    dim: int
    active: bool
    photos: int
    missing: int

    def as_dict(self) -> dict:
        values = asdict(self)
        del values["id"]
        return values


def held_models(catalog: Catalog) -> list[HeldModel]:
    """All of a library's models, the one that search uses first."""
    total = catalog.scalar(select(func.count()).select_from(Photo).where(is_present(Photo.id))) or 0
    counted = select(Embedding.model_id, func.count().label("photos")).where(is_present(Embedding.photo_id))
    covered = {row.model_id: row.photos for row in catalog.rows(counted.group_by(Embedding.model_id))}
    held = []
    for row in catalog.rows(select(*Model.__table__.c).order_by(Model.active.desc(), Model.id)):
        photos = covered.get(row.id, 0)
        held.append(HeldModel(row.id, row.name, row.fingerprint, row.dim, row.active, photos, total - photos))
    return held


def complete_model(catalog: Catalog, encoder) -> HeldModel:
    """The vectors of these weights, if every photo on disk has one. Raises ModelError with the command that helps."""
    found = next((held for held in held_models(catalog) if held.fingerprint == encoder.fingerprint), None)
    if found is None:
        raise ModelError(
            f"the library holds no vectors of {encoder.name}: run `photoblip reindex --model {encoder.name}`"
        )
    if found.missing:
        raise ModelError(
            f"{found.name} covers {found.photos} of {found.photos + found.missing} photos: "
            f"run `photoblip reindex --model {found.name}`, which does the rest and then switches to it"
        )
    return found


def remove_model(catalog: Catalog, paths: LibraryPaths, name: str) -> int:
    """Drop all vectors of a model that search does not use. -> how many photos' vectors went.

    Raises LibraryError for the active model, and for one of which there are none.
    """
    held = [each for each in held_models(catalog) if each.name == name]
    if any(each.active for each in held):
        raise LibraryError(f"search uses {name}: switch with `photoblip models use` to another model first")
    if not held:
        names = ", ".join(each.name for each in held_models(catalog)) or "none"
        raise LibraryError(f"the library holds no vectors of {name}: it has those of {names}")
    _drop(catalog, [each.id for each in held])
    for each in held:
        file = paths.vectors(each.fingerprint)
        for derived in file.parent.glob(f"{file.name}*"):
            derived.unlink(missing_ok=True)
    return sum(each.photos for each in held)


def _drop(catalog: Catalog, ids: Sequence[int]) -> None:
    with catalog.transaction() as connection:
        connection.execute(delete(Embedding).where(Embedding.model_id.in_(ids)))
        connection.execute(delete(Model).where(Model.id.in_(ids)))
        bump_generation(connection)
