"""PhotoLibrary: the Python API. The command line and the app are thin layers over it."""

import gc
import inspect
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from sqlalchemy import func, select

from blipcore.hub import abilities, canonical_name, models_here, own_name
from blipcore.imports import collector_paused
from indexer import answers as asking
from indexer import backup as safekeeping
from indexer import choices, comparison, exporting, finetuning, forgetting, jobs, organise
from indexer import held_models as shelf
from indexer.catalog import Catalog, chunks, is_present
from indexer.conditions import parse_condition, plain_question
from indexer.config import DEFAULT_MODEL, LibraryPaths, default_library, patch_budget, patch_form
from indexer.embed import BATCH_SIZE
from indexer.errors import LibraryError, ModelError, NotEnoughMemory, PhotoNotFound, QueryError, UnreadablePhoto
from indexer.images import open_image, thumbnail_path
from indexer.index_file import FLAT, index_kind
from indexer.patch_store import PatchStore
from indexer.schema import Answer, Caption, Embedding, Failure, File, Photo, Root
from indexer.storage import storage

PICTURE_SIDE = 768
MANY = 20_000  # vectors added to the index at once, and worth a save when it opens
SAMPLE = 256  # vectors compared with the catalog when an index opens
TUNING_TEXTS = 512  # captions that an index of many photos is tuned on
ABILITIES = {  # what a model may be unable to do, and the smallest one that can
    "ask": ("answer questions", "blip-vqa-base"),
    "chat": ("hold a conversation", "qwen2-vl-2b"),
    "ground": ("point at things", "qwen2-vl-2b"),
}


Photos = int | str | Path | Sequence[int | str | Path]


class PhotoLibrary:
    """A folder that knows your photos: a catalog, thumbnails and a vector index. Originals are only read.

    Open with `PhotoLibrary.open`; usable from several threads; close it, or use it as a context manager.
    """

    def __init__(self, folder: Path, catalog: Catalog, model: str | None, load_encoder: Callable):
        self.paths = LibraryPaths(folder)
        self.catalog = catalog
        self._wanted_model = model
        self._load_encoder = load_encoder
        self._encoders: dict[str, object] = {}
        self._searcher = None
        self._patches: PatchStore | None = None
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        folder: str | Path | None = None,
        *,
        create: bool = True,
        model: str | None = None,
        load_encoder=None,
        cold: bool = False,
    ) -> "PhotoLibrary":
        """Open a library; makes one where there is none, unless `create` is False.

        Args:
            folder: default `PHOTOBLIP_LIBRARY` or the platform's data directory.
            model: what a NEW library is indexed with: a known name or a model folder (default blip-mini).
            load_encoder: name -> encoder, for programs and tests that bring their own.
            cold: for one search, after which the process ends: PyTorch, which takes seconds to import and is faster
                from then on, is left out where nothing needs it.

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
        return cls(paths.folder, Catalog(paths.catalog), model, load_encoder or partial(_load_encoder, cold=cold))

    def close(self) -> None:
        """Let go of all files; what is asked next opens them again."""
        self.catalog.close()
        if self._patches is not None:
            self._patches.close()

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
                patches=self.patches(),
            )
            report = job.run(folders)
            self._save_index()
        return report

    def reindex(
        self, model: str, progress: Callable | None = None, workers: int = 2, *, switch: bool = True
    ) -> tuple[int, int]:
        """Give all photos vectors of another model, then switch search to it. -> (photos covered, photos failed).

        Search goes on with the old model until the switch; the old vectors stay, so that going back embeds only
        photos that came since. A photo fails where neither its thumbnail nor a file of it can be read; `index`
        tries it again.

        Args:
            model: a known name, the name of one of this library's own models (see `finetune`), or a model folder.
            switch: False leaves search with the model that it uses: see `use_model` and `compare_models`.
        """
        encoder = self._encoder_named(model, fresh=True)
        with jobs.exclusive(self.paths):
            model_id, failed = jobs.embed_missing(
                self.catalog, self.paths, encoder, progress=progress, workers=workers, patches=self.patches()
            )
            if switch:
                self._switch_to(model_id)
        return len(self.catalog.searchable_ids(model_id)), failed

    def models(self) -> list[shelf.HeldModel]:
        """The models whose vectors the library holds, the one that search uses first."""
        return shelf.held_models(self.catalog)

    def use_model(self, name: str) -> None:
        """Switch search to a model of which every photo has vectors, at once.

        Raises ModelError where some photos have none, or the model cannot be loaded.
        """
        with jobs.exclusive(self.paths):
            self._switch_to(shelf.complete_model(self.catalog, self._encoder_named(name, fresh=True)).id)

    def remove_model(self, name: str) -> int:
        """Drop the vectors of a model that search does not use. -> of how many photos."""
        with jobs.exclusive(self.paths):
            return shelf.remove_model(self.catalog, self.paths, self.model_name(name))

    def compare_models(self, first: str, second: str, queries: str | Path, *, k: int = 10, rerank: int = 100):
        """Ask two models the same queries, each over all photos. -> comparison.Comparison.

        Args:
            queries: a file of one query a line; where it is known, a tab and the photo that it means.
            k: how many results are compared. rerank: as in `search`.
        """
        asked = comparison.read_queries(Path(queries).expanduser(), self.catalog.find_photo)
        encoders = [self._encoder_named(name) for name in (first, second)]
        searchers = [self._searcher_with(encoder) for encoder in encoders]

        from indexer.query import Query

        def search_with(searcher):
            return lambda text, top_k: searcher.search(Query.parse(text), top_k=top_k, rerank=rerank)

        names = encoders[0].name, encoders[1].name
        return comparison.compare(names, tuple(search_with(each) for each in searchers), asked, k)

    def _switch_to(self, model_id: int) -> None:
        self.catalog.activate(model_id)
        with self._lock:
            self._searcher = None
        self._save_index()

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

    def edit_caption(self, photo: int | str, text: str, new: str | None) -> None:
        """Change one of the user's own captions, or with None take it away. Raises LibraryError where there is none."""
        with self.catalog.transaction() as connection:
            jobs.edit_own_caption(connection, self.photo_id(photo), text, new)

    def write_captions(self, image, model: str | None = None) -> dict:
        """Captions of a picture in several styles of decoding, none of them kept. -> {style: (text, score)}.

        Styles: "short", "detailed", "sampled" of the models that can be told; else "plain" alone. The score is the
        match probability, None where no model here can match.
        """
        encoder = self._encoder_named(model) if model else self.encoder()
        styles = getattr(encoder, "caption_styles", {"plain": {}})
        judge, picture = None if encoder.can_match else self._judge(), self._open_query(image)
        return {style: encoder.caption([picture], judge=judge, **how)[0] for style, how in styles.items()}

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
        likely: bool = False,
        approximate: bool = False,
        ask: str | None = None,
        answer: str | None = None,
        ask_model: str | None = None,
    ):
        """Photos for words, example pictures, or both; best first. With a filter alone, the newest that pass it.

        Args:
            text: what the search box takes (see indexer.query): words, `no people`, `2:dogs + snow`, `"exact words"`,
                `photo:12`, filters.
            image: an example: a path, bytes, a PIL image, or the id of one of the library's photos; or several.
            without: phrases that speak against a photo; one that shows one, or has it beside it, is dropped.
            where: a filter, as text or {field: value}; see indexer.filters.
            rerank: how many candidates the matching model reads; 0 for none.
            budget_ms: time for re-ranking; what it does not reach keeps its first-stage order.
            min_probability: drop results below it, and those that were not re-ranked.
            likely: drop results below the cut, and those that were not re-ranked: nothing is left where nothing fits.
            approximate: with a model of several vectors a photo (BLIP-2), compare all of them only of the photos that
                one vector a photo names: faster in a large library, and some photos are missed (docs/family.md).
            ask: a question that each of the top_k results is asked, once for all searches: it becomes its `.answer`.
            answer: keep results whose answer fulfils it: ">2", "2..5", "yes", "red|blue"; see indexer.conditions.
            ask_model: the model that answers, by default the active one; see `ask`.

        Returns:
            SearchResults: a list of SearchResult, with `.reranked`, `.candidates`, `.seconds`, `.query` as it was
            understood, and `.cut`: how many of them, the first ones, are likely.

        Raises:
            QueryError: nothing to search for, or a query, filter or condition that cannot be read; it names the place.
            UnreadablePhoto: the example picture cannot be decoded. ModelError: the model cannot answer.
        """
        query = self._query(text, image, without, where)
        budget = None if budget_ms is None else budget_ms / 1000
        condition = _condition(ask, answer)
        searcher = self._searcher_for(approximate)
        encoder = None if ask is None else self.encoder_that("ask", ask_model, "--ask-model")
        hits = searcher.search(
            query,
            top_k=top_k,
            rerank=rerank,
            budget_seconds=budget,
            min_probability=min_probability,
            likely=likely,
            approximate=approximate,
        )
        if encoder is not None:
            hits[:] = asking.beside(hits, ask, self._answers(encoder, hits, ask), condition)
        return hits

    def search_progressively(
        self, text: str | None = None, *, image=None, without: str | Sequence[str] = (), where=None, **options
    ) -> Iterator:
        """As `search`, but the first stage's results come at once, then the re-ranked ones: one or two SearchResults.

        Args:
            options: top_k, rerank, budget_ms, min_probability, likely, approximate; as `search` takes them.
        """
        query, budget = self._query(text, image, without, where), options.pop("budget_ms", None)
        searcher = self._searcher_for(options.get("approximate", False))
        return searcher.stages(query, budget_seconds=None if budget is None else budget / 1000, **options)

    def evaluate(
        self,
        queries: Iterable[tuple[int | str, str]] | None = None,
        *,
        limit: int | None = None,
        rerank: int = 100,
        report: str | Path | None = None,
        progress: Callable | None = None,
    ):
        """How well this library is searched: recall, MRR, nDCG and latency of each way of searching.

        Args:
            queries: (photo, what is asked for it); by default a caption of each photo that people captioned, which
                then does not stand in the full text.
            limit: so many photos, drawn at random. rerank: candidates that the matching model reads.
            report: the folder of the saved report; by default the library's own `reports`.
            progress: called with (queries done, all of them).

        Returns:
            indexer.evaluate.LibraryReport

        Raises:
            LibraryError: there is nothing to ask. PhotoNotFound: a photo of the queries.
        """
        from indexer import evaluate as measuring

        if queries is None:
            asked, held_out = measuring.own_queries(self.catalog, limit)
        else:
            asked = [measuring.Asked(text, frozenset([self.photo_id(photo)])) for photo, text in queries]
            asked, held_out = measuring.drawn(asked, limit), []
        options = {} if progress is None else {"progress": progress}
        found = measuring.evaluate(self.searcher(), asked, held_out, rerank=rerank, **options)
        found.save(Path(report) if report else self.paths.reports)
        return found

    def _query(self, text, image, without, where):
        from indexer.query import Query

        images = () if image is None else tuple(image) if isinstance(image, list | tuple) else (image,)
        return Query.parse(text, images=images, without=[without] if isinstance(without, str) else without, where=where)

    def similar(self, photo: int | str, *, top_k: int = 20, where=None):
        """Photos that look like one of the library."""
        return self.searcher().similar(self.photo_id(photo), top_k, where)

    def describe(self, image, *, candidates: Iterable[str] | None = None, things: bool = False, top_k: int = 5):
        """The texts that fit a picture best: of the library's captions, of the given lines, or of everyday things."""
        if things:
            from indexer.tagging import describe_things

            return describe_things(self.searcher(), self._open_query(image), top_k)
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

    def explain(self, photo: int | str, text: str, word: str | None = None):
        """Where a photo shows the words of a text, by what the matching model reads. -> a heat map a word, in order.

        Args:
            word: only this word or phrase; its heat map alone is given. One that is not in the text is read by itself.

        Returns:
            blipcore.heat_map.HeatMap, or a list of them: `.word`, `.weights`, `.image(picture)`.
        """
        encoder, picture = self.encoder(), self.picture(self.photo_id(photo))
        maps = encoder.explain(picture, text, None if word is None else [word])
        if not maps:
            raise QueryError("there is no word to explain: give words")
        return maps if word is None else maps[0]

    def draw_heat(self, photo: int | str, maps: Sequence, title: str = ""):
        """Heat maps of `explain` over the photo, side by side with their words, as a PIL image."""
        from blipcore.heat_map import sheet

        return sheet(self.picture(self.photo_id(photo)), maps, title)

    # -- the user's own order (indexer.organise): `photos` are ids or paths, one or several -------------------

    def tag(self, photos: Photos, tags: str | Sequence[str]) -> int:
        """Hang tags on photos. -> how many were new."""
        return organise.tag(self.catalog, self.photo_ids(photos), [tags] if isinstance(tags, str) else tags)

    def untag(self, photos: Photos, tags: str | Sequence[str]) -> int:
        """Take tags off photos, whoever gave them: the user, the file or a model. -> how many there were."""
        return organise.untag(self.catalog, self.photo_ids(photos), [tags] if isinstance(tags, str) else tags)

    def tags(self) -> list[dict]:
        """All tags, the commonest first: name, photos, and how many of these by user, file and generated."""
        return organise.tags(self.catalog)

    def albums(self) -> list[dict]:
        """Albums by name: name, photos, missing (photos that are not on disk now), created_at."""
        return organise.albums(self.catalog)

    def album(self, name: str) -> list[int]:
        """Ids of an album's photos that are on disk, in the order in which they came to it."""
        return organise.album_photos(self.catalog, name)

    def create_album(self, name: str) -> None:
        """Raises LibraryError where there is one of that name."""
        organise.create_album(self.catalog, name)

    def add_to_album(self, name: str, photos: Photos) -> int:
        """Put photos into an album that there is. -> how many were not in it yet."""
        return organise.add_to_album(self.catalog, name, self.photo_ids(photos))

    def remove_from_album(self, name: str, photos: Photos) -> int:
        """Take photos out of an album; they stay in the library. -> how many were in it."""
        return organise.remove_from_album(self.catalog, name, self.photo_ids(photos))

    def rename_album(self, name: str, new_name: str) -> None:
        organise.rename_album(self.catalog, name, new_name)

    def delete_album(self, name: str) -> int:
        """Take an album apart; its photos stay in the library. -> how many were in it."""
        return organise.delete_album(self.catalog, name)

    def set_favourite(self, photos: Photos, favourite: bool = True) -> None:
        organise.set_favourite(self.catalog, self.photo_ids(photos), favourite)

    def rate(self, photos: Photos, rating: int | None) -> None:
        """Give photos 0 to 5 stars; None takes the rating away."""
        organise.rate(self.catalog, self.photo_ids(photos), rating)

    def set_title(self, photos: Photos, title: str | None) -> None:
        """Give photos a title; None or blank takes it away."""
        organise.set_title(self.catalog, self.photo_ids(photos), title)

    def save_search(self, name: str, query: Mapping, *, replace: bool = False) -> None:
        """Keep a search under a name: the arguments of `search`, as JSON values.

        Raises QueryError for arguments that `search` does not have, LibraryError for a name that is taken.
        """
        accepted = inspect.signature(self.search).parameters
        organise.save_search(self.catalog, name, query, accepted, replace)

    def filter_choices(self) -> dict[str, list[tuple[object, int]]]:
        """What filters can be set to, with how many photos: years, cameras, formats; see also `tags` and `albums`."""
        return choices.filter_choices(self.catalog)

    def example_queries(self, count: int = 6) -> list[str]:
        """Searches to begin with, from this library's own captions and tags."""
        return choices.example_queries(self.catalog, count)

    def saved_searches(self) -> list[dict]:
        """Saved searches by name: name, query (the arguments of `search`), created_at."""
        return organise.saved_searches(self.catalog)

    def saved_search(self, name: str) -> dict:
        """The arguments that a saved search gives `search`: `library.search(**library.saved_search("beach"))`."""
        return organise.saved_search(self.catalog, name)

    def delete_saved_search(self, name: str) -> None:
        organise.delete_saved_search(self.catalog, name)

    def present(self) -> list[int]:
        """Ids of all photos on disk."""
        return [row.id for row in self.catalog.rows(select(Photo.id).where(is_present(Photo.id)).order_by(Photo.id))]

    def untagged(self) -> list[int]:
        """Ids of photos on disk that the matching model has not tagged yet from the list of things."""
        from indexer.tagging import untagged

        return untagged(self.catalog, self._matching().encoder)

    def tag_things(self, photos: Photos, *, threshold: float | None = None, limit: int | None = None, progress=None):
        """Let the matching model tag photos with what they show of `indexer/things.txt`; see `indexer.tagging`.

        Its earlier tags are replaced, the user's stay. May be stopped at any moment: `untagged` says what is left.

        Args:
            threshold: the least match probability of a tag. limit: the most tags of a photo.

        Returns:
            TagReport: `.tags`, {photo id: [(name, probability)]}, and `.failed`, photos that cannot be read.
        """
        from indexer.tagging import LIMIT, THRESHOLD, tag_photos

        return tag_photos(
            self.catalog,
            self._matching(),
            self.photo_ids(photos),
            threshold=THRESHOLD if threshold is None else threshold,
            limit=LIMIT if limit is None else limit,
            progress=progress,
        )

    def audit(self, photos: Photos | None = None, *, below: float | None = None, progress: Callable | None = None):
        """People's captions and tags that the matching model believes wrong, the most suspicious first.

        Args:
            photos: by default all that people wrote about. below: match probability under which a text is suspicious.

        Returns:
            Suspicion list: photo_id, path, kind, text, probability, suggestion, suggestion_probability.
        """
        from indexer.audit import BELOW, audit

        ids = None if photos is None else self.photo_ids(photos)
        least = BELOW if below is None else below
        return audit(self.catalog, self._matching(), below=least, photo_ids=ids, progress=progress)

    def _matching(self):
        """What reads photos against texts. Raises ModelError where the active model cannot."""
        reranker = self.searcher().reranker
        if not reranker.encoder.can_match:
            raise ModelError(f"{reranker.encoder.name} cannot match texts: use blip-mini, or download blip-base")
        return reranker

    def duplicates(self, *, likeness: float | None = None, exact: bool = False, progress: Callable | None = None):
        """Groups of photos that are the same picture, see `indexer.duplicates.find_duplicates`; nothing is deleted.

        Args:
            likeness: from which two pictures count as the same, 0 to 1. exact: only copies, byte for byte.

        Returns:
            DuplicateGroup list: `.photos`, the best first, each with its paths and likeness; `.spare_bytes`.
        """
        from indexer.duplicates import LIKENESS, find_duplicates

        least = LIKENESS if likeness is None else likeness
        return find_duplicates(self.catalog, self.paths.thumbnails, likeness=least, exact=exact, progress=progress)

    # -- safekeeping ----------------------------------------------------------------------------------------

    def backup(self, file: str | Path, *, thumbnails: bool = False, replace: bool = False) -> safekeeping.Backup:
        """Write the catalog and the library's own models into one file and check it; jobs may run meanwhile.

        Raises LibraryError for a file that is there already, unless `replace`. `indexer.backup.restore_backup` is
        the way back.
        """
        return safekeeping.write_backup(self.catalog, self.paths, Path(file), thumbnails=thumbnails, replace=replace)

    def export(self, file: str | Path, kind: str = "csv", *, replace: bool = False) -> int:
        """Write all that is known of the photos as a table: "csv", "json" (a line each) or "parquet". -> how many."""
        return exporting.export(self.catalog, kind, Path(file), replace=replace)

    def forget(self, folder: str | Path, *, purge: bool = False, dry_run: bool = False) -> forgetting.Forgotten:
        """Take an indexed folder out of the library; originals and people's words stay, see `indexer.forgetting`.

        Args:
            purge: also remove thumbnails, vectors and models' words of photos that leave search.
            dry_run: do nothing, say what would be done.
        """
        with jobs.exclusive(self.paths):
            report = forgetting.forget(self.catalog, self.paths, folder, purge=purge, dry_run=dry_run)
            if not dry_run:
                self._save_index()
                if purge:  # what was read of other photos comes back when it is needed
                    self.patches().clear()
        return report

    # -- looking things up ----------------------------------------------------------------------------------

    def photo_id(self, photo: int | str | Path) -> int:
        """Raises PhotoNotFound for an id or path the library does not know."""
        found = self.catalog.find_photo(str(photo) if isinstance(photo, Path) else photo)
        if found is None:
            raise PhotoNotFound(f"the library has no photo {photo}: give an id from a search, or index its folder")
        return found

    def photo_ids(self, photos: Photos) -> list[int]:
        """The ids of one photo or several, each once. Raises PhotoNotFound, before anything is done to the others."""
        named = [photos] if isinstance(photos, int | str | Path) else photos
        return list(dict.fromkeys(self.photo_id(photo) for photo in named))

    def photo(self, photo: int | str) -> dict:
        """All that is known of a photo: metadata, title, favourite, rating, tags, albums, paths, captions, answers."""
        photo_id = self.photo_id(photo)
        row = self.catalog.photo_rows([photo_id])[photo_id]
        del row["phash"], row["tagged_with"]  # the library's own notes
        row["tags"] = organise.tags_of(self.catalog, photo_id)
        row["albums"] = organise.albums_of(self.catalog, photo_id)
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
            "index_kind": index_kind(self.paths.vectors(model.fingerprint)) if model else FLAT,
            "roots": [row.path for row in self.catalog.rows(select(Root.path).order_by(Root.id))],
            "bytes": scalar(select(func.coalesce(func.sum(Photo.bytes), 0)).where(present)),
            "job": self.catalog.latest_job(),
        }  # fmt: skip

    def storage(self) -> dict[str, int]:
        """Bytes on disk of the library's parts: catalog, thumbnails, index, image tokens, own models, reports."""
        return storage(self.paths)

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

    def patches(self) -> PatchStore:
        """Image tokens kept for matching."""
        with self._lock:
            if self._patches is None:
                self._patches = PatchStore(self.paths.patches, patch_budget(self.paths.folder))
            return self._patches

    def searcher(self):
        """The searcher over an index that is level with the catalog now."""
        with self._lock:
            model = self.catalog.active_model()
            if model is None:
                raise LibraryError("the library is empty: run `photoblip index DIR` first")
            if self._searcher is None or self._searcher.model.id != model.id:
                self._searcher = self._make_searcher(model, self.encoder())
            if self._level(self._searcher.index, model):  # this process lives to see the library grow
                index, file = self._searcher.index, self.paths.vectors(model.fingerprint)
                index.retrain_beside(self._caption_vectors, done=lambda: index.save(file))
            return self._searcher

    def _searcher_for(self, approximate: bool):
        """The searcher, with one vector a photo beside the index where that is asked for: made once, and kept."""
        searcher = self.searcher()
        if approximate and searcher.index.per_photo > 1:
            searcher.index.summary(self.paths.vectors(searcher.model.fingerprint))
        return searcher

    def _make_searcher(self, model, encoder):
        from indexer.rerank import Reranker, patch_keys
        from indexer.search import Searcher

        keys = partial(patch_keys, self.catalog, model.fingerprint, patch_form())
        reranker = Reranker(encoder, self.picture, self.patches(), keys, patch_form())
        return Searcher(self.catalog, self._open_index(model), encoder, model, reranker, self._open_query)

    def _searcher_with(self, encoder):
        """A searcher of any model of which every photo has vectors. Raises ModelError for others."""
        return self._make_searcher(shelf.complete_model(self.catalog, encoder), encoder)

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
        ids = index.ids()
        some = ids[np.linspace(0, len(ids) - 1, min(len(ids), SAMPLE)).astype(int)]
        return self._different_vectors(index, model, np.union1d(ids[-SAMPLE:], some)) > 0

    def _different_vectors(self, index, model, ids: np.ndarray) -> int:
        """How many of these photos have another vector in the index than in the catalog."""
        different = 0
        for part, vectors in self.catalog.vectors(model.id, np.intersect1d(ids, index.ids(), assume_unique=True)):
            different += int((index.vectors(part) != vectors).reshape(len(part), -1).any(1).sum())
        return different

    def _level(self, index, model) -> int:
        """Take in what the catalog committed since the index last looked. -> how many vectors were added."""
        generation = self.catalog.generation()
        if generation == index.generation:
            return 0
        wanted, held = self.catalog.searchable_ids(model.id), index.ids()
        index.remove(np.setdiff1d(held, wanted, assume_unique=True))
        fresh = np.setdiff1d(wanted, held, assume_unique=True)
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
                if index.due() and index.retrain(self._caption_vectors):  # which may take a minute, and be cut short
                    index.save(self.paths.vectors(model.fingerprint))

    def _caption_vectors(self) -> np.ndarray | None:
        """Vectors of some of the library's captions, a user's own first: the nearest thing to what is searched for."""
        query = select(Caption.text).group_by(Caption.text)
        query = query.order_by(func.min(Caption.source != "user"), func.random()).limit(TUNING_TEXTS)
        texts = [row.text for row in self.catalog.rows(query)]
        try:
            return np.concatenate([self.encoder().embed_texts(part) for part in chunks(texts, 64)]) if texts else None
        except ModelError:  # the model is not here any more: the index makes up queries
            return None

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


def _load_encoder(name: str, *, cold: bool):
    with collector_paused():
        if cold:
            from blipcore.cold_encoder import load_cold_encoder as load
        else:
            from blipcore.encoder import load_encoder as load

    return load(name)
