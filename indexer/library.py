"""PhotoLibrary: the Python API. The command line and the app are thin layers over it."""

import gc
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from sqlalchemy import func, select

from blipcore.hub import abilities, canonical_name, models_here, own_name
from indexer import answers as asking
from indexer import finetuning, jobs
from indexer.catalog import Catalog, chunks, is_present
from indexer.conditions import parse_condition, plain_question
from indexer.config import DEFAULT_MODEL, LibraryPaths, default_library
from indexer.embed import BATCH_SIZE
from indexer.errors import LibraryError, ModelError, NotEnoughMemory, PhotoNotFound, QueryError, UnreadablePhoto
from indexer.images import open_image, thumbnail_path
from indexer.query import Query
from indexer.schema import Answer, Caption, Embedding, Failure, File, Photo, Root

PICTURE_SIDE = 768
MANY = 20_000  # vectors added to the index at once, and worth a save when it opens
SAMPLE = 256  # vectors compared with the catalog when an index opens
ABILITIES = {  # what a model may be unable to do, and the smallest one that can
    "ask": ("answer questions", "blip-vqa-base"),
    "chat": ("hold a conversation", "qwen2-vl-2b"),
    "ground": ("point at things", "qwen2-vl-2b"),
}


class PhotoLibrary:
    """A folder that knows your photos: a catalog, thumbnails and a vector index. Originals are only read.

    Open with `PhotoLibrary.open`; usable from several threads; close it, or use it as a context manager.
    """

    def __init__(self, folder: Path, catalog: Catalog, model: str | None = None, load_encoder: Callable | None = None):
        self.paths = LibraryPaths(folder)
        self.catalog = catalog
        self._wanted_model = model
        self._load_encoder = load_encoder or _load_encoder
        self._encoders: dict[str, object] = {}
        self._searcher = None
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        folder: str | Path | None = None,
        *,
        create: bool = True,
        model: str | None = None,
        load_encoder=None,
    ) -> "PhotoLibrary":
        """Open a library; makes one where there is none, unless `create` is False.

        Args:
            folder: default `PHOTOBLIP_LIBRARY` or the platform's data directory.
            model: what a NEW library is indexed with: a known name or a model folder (default blip-mini).
            load_encoder: name -> encoder, for programs and tests that bring their own.

        Raises:
            LibraryError: no library there (with create=False), or its catalog cannot be read.
        """
        folder = Path(folder).expanduser() if folder else default_library()
        paths = LibraryPaths(folder.absolute())
        if not create and not paths.catalog.exists():
            raise LibraryError(f"there is no library at {folder}: make one with `photoblip index DIR`")
        try:
            paths.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LibraryError(
                f"{folder} cannot hold a library ({error.strerror}): choose another --library"
            ) from error
        return cls(paths.folder, Catalog(paths.catalog), model, load_encoder)

    def close(self) -> None:
        self.catalog.close()

    def __enter__(self) -> "PhotoLibrary":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- jobs -----------------------------------------------------------------------------------------------

    def index(
        self,
        *folders: str | Path,
        progress: Callable | None = None,
        workers: int = 2,
        batch_size: int = BATCH_SIZE,
    ) -> jobs.SyncReport:
        """Add or refresh folders. May be stopped at any moment, and goes on where it stopped.

        Args:
            progress: called with a `jobs.Progress` after each step.
            workers: processes that decode; 0 decodes in this one.

        Raises:
            LibraryBusy: another process is indexing. LibraryError: a folder that does not exist.
        """
        with jobs.exclusive(self.paths):
            job = jobs.IndexJob(
                self.catalog,
                self.paths,
                self.encoder,
                workers=workers,
                batch_size=batch_size,
                progress=progress,
            )
            report = job.run(folders)
            self._save_index()
        return report

    def reindex(self, model: str, progress: Callable | None = None, workers: int = 2) -> tuple[int, int]:
        """Give all photos vectors of another model, then switch search to it. -> (photos covered, photos failed).

        Search goes on with the old model until the switch; the old vectors stay, so that going back embeds only
        photos that came since. A photo fails where neither its thumbnail nor a file of it can be read; `index`
        tries it again.

        Args:
            model: a known name, the name of one of this library's own models (see `finetune`), or a model folder.
        """
        encoder = self._encoder_named(model, fresh=True)
        with jobs.exclusive(self.paths):
            model_id, failed = jobs.embed_missing(self.catalog, self.paths, encoder, progress=progress, workers=workers)
            self.catalog.activate(model_id)
            with self._lock:
                self._searcher = None
            self._save_index()
        return len(self.catalog.searchable_ids(model_id)), failed

    def caption(
        self,
        photos: int | str | Sequence[int | str],
        *,
        model: str | None = None,
        progress: Callable | None = None,
    ):
        """Write and keep a caption. -> (text, score) for one photo, {photo id: (text, score)} for several.

        The score is the matching probability of that text: the model's own, or the library's where it has none.
        """
        single = isinstance(photos, int | str)
        ids = list(dict.fromkeys(self.photo_id(photo) for photo in ([photos] if single else photos)))
        encoder = self._encoder_named(model) if model else self.encoder()
        if not encoder.can_caption:
            raise ModelError(f"{encoder.name} cannot write captions: use blip-mini, or download blip-base")
        judge = None if encoder.can_match else self._judge()
        written = jobs.caption_photos(self.catalog, encoder, self.picture, ids, judge=judge, progress=progress)
        if not single:
            return written
        if not written:
            raise PhotoNotFound(f"photo {ids[0]} cannot be read any more: run `photoblip index` on its folder")
        return written[ids[0]]

    def _judge(self):
        """The library's own model, where it can say how well a text fits a photo."""
        own = self.encoder()
        return own if own.can_match else None

    def uncaptioned(self) -> list[int]:
        """Ids of photos on disk that no model has captioned yet."""
        done = select(Caption.photo_id).where(Caption.source == "generated")
        query = select(Photo.id).where(is_present(Photo.id), Photo.id.not_in(done)).order_by(Photo.id)
        return [row.id for row in self.catalog.rows(query)]

    def add_caption(self, photo: int | str, text: str) -> None:
        """Keep the user's own words for a photo."""
        with self.catalog.transaction() as connection:
            jobs.store_caption(connection, self.photo_id(photo), text, None, None)

    def finetune(
        self,
        recipe: Callable,
        *,
        name: str | None = None,
        model: str | None = None,
        generated: bool = False,
        **options,
    ):
        """Teach a model this library's captions: a new model in `models/NAME`, which `reindex(NAME)` adopts.

        Thumbnails and captions are only read, and search stays with the active model. A run that was stopped goes
        on when it is called again.

        Args:
            recipe: `blipcore.training.finetune`. options: its settings, as epochs, minutes, held_out.
            name: the new model's; by default "own", "own-2", ...
            model: what to begin with; by default the active model.
            generated: learn from photos that only models have captioned too, where they were sure.

        Returns:
            blipcore.training.recipes.finetune_library.Report: recall on held-out photos before and after, and more.

        Raises:
            ModelError: too few captions. LibraryError: a name that is taken. LibraryBusy: another fine-tuning runs.
        """
        models, thumbnails, active = self.paths.models, self.paths.thumbnails, self.catalog.active_model()
        start = self.model_name(model or (active.name if active else self._wanted_model or DEFAULT_MODEL))
        with jobs.exclusive(self.paths, models / ".lock"):
            name = finetuning.new_name(models, name)
            run = models / f".{name}"
            report = recipe(
                finetuning.people_captioned(self.catalog, thumbnails),
                generated=finetuning.model_captioned(self.catalog, thumbnails) if generated else None,
                start=self._model_place(start),
                name=name,
                out=run,
                **options,
            )
            report.folder.rename(models / name)
            shutil.rmtree(run)
        return replace(report, folder=models / name)

    # -- search ---------------------------------------------------------------------------------------------

    def search(  # noqa: PLR0913 - all that a search can be told
        self,
        text: str | None = None,
        *,
        image=None,
        without: str | Sequence[str] = (),
        where=None,
        top_k: int = 20,
        rerank: int = 100,
        budget_ms: float | None = None,
        min_probability: float | None = None,
        ask: str | None = None,
        answer: str | None = None,
        ask_model: str | None = None,
    ):
        """Photos for words, an example picture, or both; best first.

        Args:
            image: a path, bytes, or a PIL image.
            without: phrases; photos that the matching model finds to show one are dropped.
            where: a filter, as text or {field: value}; see indexer.query.
            rerank: how many candidates the matching model reads; 0 for none.
            budget_ms: time for re-ranking; what it does not reach keeps its first-stage order.
            min_probability: drop results below it, and those that were not re-ranked.
            ask: a question that each of the top_k results is asked, once for all searches: it becomes its `.answer`.
            answer: keep results whose answer fulfils it: ">2", "2..5", "yes", "red|blue"; see indexer.conditions.
            ask_model: the model that answers, by default the active one; see `ask`.

        Returns:
            SearchResults: a list of SearchResult, with `.reranked`, `.candidates`, `.seconds`.

        Raises:
            QueryError: nothing to search for, or a filter or condition that cannot be read.
            UnreadablePhoto: the example picture cannot be decoded. ModelError: the model cannot answer.
        """
        query = Query(text, image, (without,) if isinstance(without, str) else tuple(without), where)
        budget = None if budget_ms is None else budget_ms / 1000
        condition = _condition(ask, answer)
        searcher = self.searcher()
        encoder = None if ask is None else self.encoder_that("ask", ask_model, "--ask-model")
        hits = searcher.search(
            query, top_k=top_k, rerank=rerank, budget_seconds=budget, min_probability=min_probability
        )
        if encoder is not None:
            hits[:] = asking.beside(hits, ask, self._answers(encoder, hits, ask), condition)
        return hits

    def similar(self, photo: int | str, *, top_k: int = 20, where=None):
        """Photos that look like one of the library."""
        return self.searcher().similar(self.photo_id(photo), top_k, where)

    def describe(self, image, *, candidates: Iterable[str] | None = None, top_k: int = 5):
        """The texts that fit a picture best: of the library's captions, or of the given lines."""
        texts = self._caption_texts() if candidates is None else {line: None for line in candidates if line.strip()}
        if not texts:
            raise LibraryError(
                "there are no texts to choose from: run `photoblip caption --missing`, or give lines with --candidates"
            )
        return self.searcher().describe(self._open_query(image), texts, top_k)

    def ask(
        self,
        photo: int | str,
        question: str,
        *,
        answers: Sequence[str] | None = None,
        model: str | None = None,
        cached: bool = True,
    ) -> str:
        """A short answer about a photo, from a model that can answer; with `answers`, the likeliest of them.

        An answer in the model's own words is kept, and given again when the same is asked, unless not `cached`.
        """
        answers = None if answers is None else [text.strip() for text in answers if text.strip()]
        if answers == []:
            raise LibraryError("there are no answers to choose from: give a line of text or more")
        photo_id = self.photo_id(photo)
        encoder = self.encoder_that("ask", model)
        if answers:
            return encoder.ask([self.picture(photo_id)], [question], answers)[0]
        found = asking.ask_photos(self.catalog, encoder, self.picture, [photo_id], question, cached=cached)
        if not found:
            raise PhotoNotFound(f"photo {photo_id} cannot be read any more: run `photoblip index` on its folder")
        return found[photo_id]

    def ask_results(
        self,
        question: str,
        over: str | Sequence,
        *,
        top_k: int = 20,
        where=None,
        model: str | None = None,
        cached: bool = True,
    ) -> list[asking.AnswerGroup]:
        """Ask a question of all of a search's results. -> equal answers together, the most probable first.

        Each answer weighs as much as the match probability of its photos (see indexer.answers). Photos that cannot
        be read are left out.

        Args:
            over: the words of a search (of which the best `top_k` photos within `where` are asked), or its results.
            cached: False asks photos again that were asked before.
        """
        plain_question(question)
        hits = self.search(over, top_k=top_k, where=where) if isinstance(over, str) else over
        encoder = self.encoder_that("ask", model)
        return asking.group_answers(hits, self._answers(encoder, hits, question, cached))

    def chat(
        self,
        photos: int | str | Sequence[int | str],
        turns: Sequence[Mapping[str, str]],
        *,
        model: str | None = None,
        **options,
    ) -> Iterator[str]:
        """The next words of a conversation about photos, piece by piece as they are written.

        Args:
            turns: {"role": "user" or "assistant", "content": text} each, a user's turn last.
            options: what the encoder's `chat` takes.

        Raises:
            ModelError: the model cannot hold a conversation.
        """
        named = [photos] if isinstance(photos, int | str) else photos
        encoder = self.encoder_that("chat", model)
        return encoder.chat([self.picture(self.photo_id(photo)) for photo in named], list(turns), **options)

    def ground(self, photo: int | str, phrase: str, *, model: str | None = None) -> list:
        """Where a photo shows a phrase: boxes with x0, y0, x1, y1 in [0, 1] and a label.

        Raises ModelError where the model cannot point at things.
        """
        encoder = self.encoder_that("ground", model)
        return encoder.ground(self.picture(self.photo_id(photo)), phrase)

    def draw_boxes(self, photo: int | str, boxes: Sequence):
        """The photo as a PIL image of at most 768 px, with boxes of `ground` drawn on it."""
        from blipcore.grounding import draw_boxes

        return draw_boxes(self.picture(self.photo_id(photo)), boxes)

    # -- looking things up ----------------------------------------------------------------------------------

    def photo_id(self, photo: int | str | Path) -> int:
        """Raises PhotoNotFound for an id or path the library does not know."""
        found = self.catalog.find_photo(str(photo) if isinstance(photo, Path) else photo)
        if found is None:
            raise PhotoNotFound(f"the library has no photo {photo}: give an id from a search, or index its folder")
        return found

    def photo(self, photo: int | str) -> dict:
        """All that is known of a photo: metadata, paths, captions, answers."""
        photo_id = self.photo_id(photo)
        row = self.catalog.photo_rows([photo_id])[photo_id]
        captions = select(Caption.text, Caption.source, Caption.model, Caption.score).where(
            Caption.photo_id == photo_id
        )
        files = select(File.path, File.missing_since).where(File.photo_id == photo_id).order_by(File.path)
        row["captions"] = [dict(c._mapping) for c in self.catalog.rows(captions.order_by(Caption.id))]
        answers = select(Answer.question, Answer.answer).where(Answer.photo_id == photo_id).order_by(Answer.question)
        row["answers"] = [dict(a._mapping) for a in self.catalog.rows(answers)]
        row["paths"] = [f.path for f in self.catalog.rows(files) if f.missing_since is None]
        return row

    def latest(self, count: int) -> list[dict]:
        """The photos that came into the library last and are on disk, newest first, as `catalog.photo_rows`."""
        query = select(Photo.id).where(is_present(Photo.id)).order_by(Photo.id.desc()).limit(count)
        ids = [row.id for row in self.catalog.rows(query)]
        rows = self.catalog.photo_rows(ids)
        return [rows[photo_id] for photo_id in ids]

    def thumbnail(self, photo_id: int) -> Path:
        """The photo's thumbnail file (it may be gone: `picture` falls back to the original)."""
        content_hash = self.catalog.scalar(select(Photo.content_hash).where(Photo.id == photo_id))
        if content_hash is None:
            raise PhotoNotFound(f"the library has no photo {photo_id}: give an id from a search")
        return thumbnail_path(self.paths.thumbnails, content_hash)

    def picture(self, photo_id: int):
        """The photo as a PIL image of at most 768 px, from its thumbnail or, where that is gone, a file of it.

        Raises UnreadablePhoto where neither can be read.
        """
        thumbnail = self.thumbnail(photo_id)
        try:
            return open_image(thumbnail)
        except UnreadablePhoto:  # gone, or cut short by a power failure
            query = select(File.path).where(File.photo_id == photo_id, File.missing_since.is_(None))
            return open_image(Path(self.catalog.scalar(query) or thumbnail), target=PICTURE_SIDE)

    def status(self) -> dict:
        """Counts and sizes; loads no model."""
        model = self.catalog.active_model()
        scalar, model_id = self.catalog.scalar, model.id if model else -1
        present = is_present(Photo.id)
        captioned = select(Caption.photo_id).distinct()
        from indexer.vector_index import KIND

        return {
            "photos": scalar(select(func.count()).select_from(Photo).where(present)),
            "embedded": scalar(
                select(func.count()).select_from(Embedding)
                .where(Embedding.model_id == model_id, is_present(Embedding.photo_id))
            ),
            "captioned": scalar(select(func.count()).select_from(Photo).where(present, Photo.id.in_(captioned))),
            "failed": scalar(select(func.count()).select_from(Failure)),
            "missing": scalar(select(func.count()).select_from(Photo).where(~present)),
            "model": model.name if model else None,
            "index_kind": KIND,
            "roots": [row.path for row in self.catalog.rows(select(Root.path).order_by(Root.id))],
            "bytes": scalar(select(func.coalesce(func.sum(Photo.bytes), 0)).where(present)),
            "job": self.catalog.latest_job(),
        }  # fmt: skip

    def errors(self) -> list[dict]:
        """Files that could not be used, each with its reason."""
        columns = (Failure.path, Failure.reason, Failure.detail, Failure.at)
        return [dict(row._mapping) for row in self.catalog.rows(select(*columns).order_by(Failure.path))]

    def verify(self) -> list[str]:
        """Check the catalog, the index and the thumbnails against each other. -> problems, as sentences."""
        problems = []
        with self.catalog.reading() as connection:
            for (line,) in connection.exec_driver_sql("PRAGMA integrity_check"):
                problems += [] if line == "ok" else [f"catalog: {line}"]
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            problems += [f"catalog: a row of {row[0]} points to nothing" for row in broken]
        model = self.catalog.active_model()
        if model is not None:
            index = self._open_index(model)
            wanted = self.catalog.searchable_ids(model.id)
            different = len(np.setxor1d(index.ids(), wanted)) + self._different_vectors(index, model, wanted)
            if different:
                problems.append(f"index: {different} photos differ from the catalog")
            unsearchable = self.status()["photos"] - len(wanted)
            if unsearchable:
                problems.append(
                    f"catalog: {unsearchable} photos have no vector: run `photoblip index` on their folders"
                )
        problems += self._missing_thumbnails()
        return problems

    # -- parts ----------------------------------------------------------------------------------------------

    def encoder(self):
        """The active model, loaded once; blip-mini, or the model asked for at `open`, in a new library."""
        active = self.catalog.active_model()
        name = active.name if active else self._wanted_model or DEFAULT_MODEL
        encoder = self._encoder_named(name)
        if active and encoder.fingerprint != active.fingerprint:
            encoder = self._encoder_named(name, fresh=True)  # another process may have changed to new weights
        if active and encoder.fingerprint != active.fingerprint:
            raise ModelError(
                f"this library was indexed with other weights of {active.name}: "
                f"run `photoblip reindex --model {active.name}`"
            )
        return encoder

    def encoder_that(self, ability: str, model: str | None = None, option: str = "--model"):
        """The active model, or the one named, if it can do that. Raises ModelError, whose way out names `option`.

        Args:
            ability: one of ABILITIES.
        """
        encoder = self._encoder_named(model) if model else self.encoder()
        if not getattr(encoder, f"can_{ability}", False):
            what, able = ABILITIES[ability]
            raise ModelError(
                f"{encoder.name} cannot {what}: run `photoblip models download {able}`, then give {option} {able}"
            )
        return encoder

    def able_models(self) -> dict[str, frozenset[str]]:
        """Models on this machine that can do any of ABILITIES, and which of them; the ablest first. Loads none."""
        folders, active = models_here(self.paths.models), self.catalog.active_model()
        if active and active.name not in folders:
            folders[active.name] = Path(active.name)
        able = {name: can for name, folder in folders.items() if (can := abilities(folder))}
        return dict(sorted(able.items(), key=lambda item: -len(item[1])))

    def _answers(self, encoder, hits: Sequence, question: str, cached: bool = True) -> dict[int, str]:
        ids = [hit.photo_id for hit in hits]
        return asking.ask_photos(self.catalog, encoder, self.picture, ids, question, cached=cached)

    def model_name(self, name_or_folder: str) -> str:
        """The one name under which the catalog keeps a model; short for one of the library's own."""
        return own_name(name_or_folder, self.paths.models) or canonical_name(name_or_folder)

    def _model_place(self, name: str) -> str:
        """What `blipcore.load` takes for a `model_name`."""
        return str(self.paths.models / name) if own_name(name, self.paths.models) else name

    def _encoder_named(self, name: str, fresh: bool = False):
        name = self.model_name(name)
        with self._lock:
            if fresh or name not in self._encoders:
                encoder = self._loaded(name)
                if own_name(name, self.paths.models):
                    encoder.name = name  # not its folder: the library may move
                self._encoders[name] = encoder
            return self._encoders[name]

    def _loaded(self, name: str):
        """A model, if need be in the memory of those that search does not need."""
        place = self._model_place(name)
        try:
            return self._load_encoder(place)
        except NotEnoughMemory:
            active = self.catalog.active_model()
            kept = {held: encoder for held, encoder in self._encoders.items() if active and held == active.name}
            if len(kept) == len(self._encoders):
                raise
            self._encoders = kept
        gc.collect()
        return self._load_encoder(place)

    def searcher(self):
        """The searcher over an index that is level with the catalog now."""
        from indexer.rerank import Reranker
        from indexer.search import Searcher

        with self._lock:
            model = self.catalog.active_model()
            if model is None:
                raise LibraryError("the library is empty: run `photoblip index DIR` first")
            if self._searcher is None or self._searcher.model.id != model.id:
                encoder = self.encoder()
                reranker = Reranker(encoder, self.picture)
                index = self._open_index(model)
                self._searcher = Searcher(self.catalog, index, encoder, model, reranker, self._open_query)
            self._level(self._searcher.index, model)
            return self._searcher

    def _open_index(self, model):
        """The saved index, brought level with the catalog; made anew from it where the file cannot be used."""
        from indexer.vector_index import VectorIndex

        try:
            index = VectorIndex.load(self.paths.vectors(model.fingerprint), model.dim)
        except ValueError:
            index = VectorIndex(model.dim)
        if self._is_of_another_catalog(index, model):
            index = VectorIndex(model.dim)
        if self._level(index, model) > MANY:
            index.save(self.paths.vectors(model.fingerprint))
        return index

    def _is_of_another_catalog(self, index, model) -> bool:
        """Whether vectors differ: the catalog was restored or begun anew, and gave old ids to other photos.

        Ids only grow, so those given twice are among the highest: they are compared, and some others.
        """
        ids = np.sort(index.ids())
        some = np.random.default_rng(0).choice(ids, min(len(ids), SAMPLE), replace=False)
        return self._different_vectors(index, model, np.union1d(ids[-SAMPLE:], some)) > 0

    def _different_vectors(self, index, model, ids: np.ndarray) -> int:
        """How many of these photos have another vector in the index than in the catalog."""
        held = set(index.ids().tolist())
        different = 0
        for part, vectors in self.catalog.vectors(model.id, (i for i in ids.tolist() if i in held)):
            different += int((index.vectors(part) != vectors).reshape(len(part), -1).any(1).sum())
        return different

    def _level(self, index, model) -> int:
        """Take in what the catalog committed since the index last looked. -> how many vectors were added."""
        generation = self.catalog.generation()
        if generation == index.generation:
            return 0
        wanted, held = self.catalog.searchable_ids(model.id), index.ids()
        index.remove(np.setdiff1d(held, wanted))
        fresh = np.setdiff1d(wanted, held)
        for part in chunks(fresh.tolist(), MANY):
            found = list(self.catalog.vectors(model.id, part))
            index.add(np.concatenate([ids for ids, _ in found]), np.concatenate([v for _, v in found]))
        index.generation = generation
        return len(fresh)

    def _save_index(self) -> None:
        with self._lock:
            model = self.catalog.active_model()
            if model is not None:
                searcher = self._searcher
                index = searcher.index if searcher and searcher.model.id == model.id else self._open_index(model)
                self._level(index, model)
                index.save(self.paths.vectors(model.fingerprint))

    def _open_query(self, image):
        return open_image(Path(image).expanduser() if isinstance(image, str) else image, target=PICTURE_SIDE)

    def _caption_texts(self) -> dict[str, int]:
        query = select(Caption.text, func.min(Caption.photo_id).label("photo_id")).group_by(Caption.text)
        return {row.text: row.photo_id for row in self.catalog.rows(query)}

    def _missing_thumbnails(self) -> list[str]:
        query = select(Photo.id, Photo.content_hash).where(is_present(Photo.id))
        rows = self.catalog.stream(query)
        gone = [row.id for row in rows if not _has_content(thumbnail_path(self.paths.thumbnails, row.content_hash))]
        return [f"thumbnails: {len(gone)} are missing (the first is of photo {gone[0]})"] if gone else []


def _condition(question: str | None, answer: str | None):
    """What an answer must fulfil, None for nothing; raises QueryError before any work is done."""
    if question is not None:
        plain_question(question)
    elif answer is not None:
        raise QueryError("a condition on the answer needs a question: give --ask too")
    return None if answer is None else parse_condition(answer)


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _load_encoder(name: str):
    from blipcore.encoder import load_encoder

    return load_encoder(name)
