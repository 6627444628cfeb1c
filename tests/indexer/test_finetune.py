"""Fine-tuning on a library: a new model beside the old one, adopted and left again; nothing of the user's changes."""

import hashlib
import json
import signal
import sys

import pytest
from sqlalchemy import select

from blipcore.checkpoint import save
from blipcore.errors import ModelError
from blipcore.training import finetune
from blipcore.transforms import TextTokenizer
from indexer import PhotoLibrary
from indexer.catalog import now
from indexer.cli import main
from indexer.errors import LibraryBusy, LibraryError
from indexer.finetuning import SURE, model_captioned, people_captioned
from indexer.jobs import exclusive, store_caption
from indexer.schema import Caption, Model
from tests.tiny import TOKENIZER, drawn_photo, tiny_blip

QUICK = {"steps": 2, "batch_size": 15, "save_every": 1, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A library of 52 drawn photos, 50 of them with words of the user's, indexed with a tiny model."""
    folder = tmp_path_factory.mktemp("made")
    base = save(tiny_blip(), folder / "tiny", TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    (folder / "photos").mkdir()
    for number in range(52):
        drawn_photo(number).save(folder / "photos" / f"{number}.png")
    with PhotoLibrary.open(folder / "library", model=str(base)) as library:
        library.index(folder / "photos", workers=0)
        for number in range(50):
            library.add_caption(str(folder / "photos" / f"{number}.png"), f"Anna's picture number {number}")
    return folder


@pytest.fixture
def library(made, tmp_path):
    """A fresh copy of the library: models and catalog of one test are not another's."""
    import shutil

    shutil.copytree(made / "library", tmp_path / "library")
    with PhotoLibrary.open(tmp_path / "library") as opened:
        yield opened


@pytest.fixture
def photoblip(library, monkeypatch, capsys):
    """Runs the command in this process on the library. -> (exit status, stdout, stderr)."""
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(library.paths.folder))
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["photoblip", *map(str, arguments)])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as stopped:
            main()
        for number, handler in before.items():
            signal.signal(number, handler)
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def hashes(folder):
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def rows_of(library, table):
    return [tuple(row) for row in library.catalog.rows(select(*table.__table__.c).order_by(table.id))]


def test_a_new_model_stands_beside_the_old_one_and_nothing_else_changed(library, made):
    files = hashes(made / "tiny") | hashes(made / "photos") | hashes(library.paths.thumbnails)
    rows = [rows_of(library, table) for table in (Caption, Model)]
    report = library.finetune(finetune, name="mine", **QUICK)
    assert hashes(made / "tiny") | hashes(made / "photos") | hashes(library.paths.thumbnails) == files
    assert [rows_of(library, table) for table in (Caption, Model)] == rows
    assert (report.photos, report.held_out_photos, report.base) == (30, 20, "tiny")
    assert set(report.before["t2i"]) == set(report.after["i2t"]) == {"r1", "r5", "r10"}
    assert report.folder == library.paths.models / "mine"
    assert {"model.safetensors", "README.md", "finetuned.json", "log.jsonl"} <= {
        f.name for f in report.folder.iterdir()
    }
    assert {folder.name for folder in library.paths.models.glob("*/")} == {"mine"}  # the run's folder is gone


def test_the_new_model_is_adopted_and_left_again(library, made, tmp_path):
    library.finetune(finetune, name="mine", rate=1e-2, **QUICK)
    old = library.search("number 7", rerank=0)
    assert library.reindex("mine", workers=0) == (52, 0)
    assert library.status()["model"] == "mine" and library.status()["embedded"] == 52
    new = library.search("number 7", rerank=0)
    assert new[0].model == "mine" and [hit.itc for hit in new] != [hit.itc for hit in old]
    assert library.caption(1)[0]
    assert library.reindex(str(library.paths.models / "mine"), workers=0) == (52, 0)  # the same model, by its folder
    assert len(rows_of(library, Model)) == 2

    embedded = []
    library.reindex(str(made / "tiny"), workers=0, progress=embedded.append)
    assert not embedded and [hit.itc for hit in library.search("number 7", rerank=0)] == [hit.itc for hit in old]

    library.reindex("mine", workers=0, progress=embedded.append)
    library.close()
    library.paths.folder.rename(tmp_path / "moved")
    with PhotoLibrary.open(tmp_path / "moved") as moved:
        assert [hit.itc for hit in moved.search("number 7", rerank=0)] == [hit.itc for hit in new] and not embedded
        again = moved.finetune(finetune, **QUICK)  # begins with the model in use
        assert (again.name, again.base) == ("own", "mine")


def test_names_are_never_taken_twice(library):
    assert [library.finetune(finetune, **QUICK).name for _ in range(2)] == ["own", "own-2"]
    before = hashes(library.paths.models)
    for name, words in (("own", "already.*models info own"), ("blip-mini", "cannot be called"), ("../x", "cannot")):
        with pytest.raises(LibraryError, match=words):
            library.finetune(finetune, name=name, **QUICK)
    assert hashes(library.paths.models) == before


def test_too_few_captions_say_how_many_and_how(library, made):
    with library.catalog.transaction() as connection:
        connection.exec_driver_sql("DELETE FROM captions WHERE id <= 10")
    with pytest.raises(ModelError, match=r"40 photos.*needs 50.*photoblip ui.*add_caption"):
        library.finetune(finetune, **QUICK)
    assert not list(library.paths.models.glob("[!.]*"))


def test_an_interruption_goes_on_under_the_same_name(library, monkeypatch):
    from blipcore.training.run_log import RunLog

    steps, write = [], RunLog.step

    def stop(self, step, losses):
        write(self, step, losses)
        steps.append(step)
        if steps == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "step", stop)
    options = QUICK | {"steps": 4}
    with pytest.raises(KeyboardInterrupt):
        library.finetune(finetune, **options)
    assert [folder.name for folder in library.paths.models.glob("*/")] == [".own"]
    report = library.finetune(finetune, **options)
    assert report.name == "own" and steps == [1, 2, 2, 3, 4]  # the second was not saved yet


def test_two_at_once_are_refused_and_indexing_is_not_held_up(library, made):
    with exclusive(library.paths, library.paths.models / ".lock"):
        with pytest.raises(LibraryBusy):
            library.finetune(finetune, **QUICK)
        assert library.index(made / "photos", workers=0).unchanged == 52


def test_what_is_learnt_from_are_peoples_words_and_what_models_are_sure_of(library, made):
    captioned, doubted, sure = (library.photo_id(made / "photos" / f"{number}.png") for number in (0, 50, 51))
    with library.catalog.transaction() as connection:
        for photo_id, score in ((captioned, 0.99), (doubted, SURE - 0.01), (sure, SURE)):
            store_caption(connection, photo_id, "a written caption", "some-model", score)
        connection.exec_driver_sql("UPDATE files SET missing_since = ? WHERE photo_id = 2", (now().isoformat(" "),))
    library.add_caption(3, "Second words")
    library.thumbnail(4).unlink()
    people = people_captioned(library.catalog, library.paths.thumbnails)
    assert len(people) == 48 and sum(people.skipped.values()) == 1
    texts = {people.key(row): people.texts_of(row) for row in range(len(people))}
    assert len(texts[library.thumbnail(3).stem]) == 2 and library.thumbnail(2).stem not in texts
    assert all("written" not in text for group in texts.values() for text in group)
    assert people[0].image().size == (64, 48)
    models = model_captioned(library.catalog, library.paths.thumbnails)
    assert [models.key(row) for row in range(len(models))] == [library.thumbnail(sure).stem]


def test_the_command_from_fine_tuning_to_going_back(photoblip, library, made):
    options = ("--epochs", 1, "--batch-size", 15)
    code, stdout, _ = photoblip("train", "finetune", "--json", *options)
    (done,) = map(json.loads, stdout.splitlines())
    assert code == 0 and (done["event"], done["name"], done["steps"]) == ("done", "own", 2)
    code, stdout, _ = photoblip("train", "finetune", "--name", "second", *options)
    assert code == 0 and "before" in stdout and "after" in stdout and "mean recall went from" in stdout
    assert ("reindex --model second" in stdout) != ("do not adopt" in stdout)

    code, stdout, _ = photoblip("models", "list", "--json")
    rows = {row["name"]: row for row in map(json.loads, stdout.splitlines())}
    assert code == 0 and {"blip-mini", "own", "second"} <= set(rows)
    assert rows["own"]["after"] == done["after"] and rows["own"]["base"] == "tiny" and rows["own"]["gigabytes"] < 0.1
    assert "tiny: " in photoblip("models", "--library", library.paths.folder)[1]
    code, stdout, _ = photoblip("models", "info", "own", "--json")
    info = json.loads(stdout)
    assert code == 0 and info["fingerprint"] and (info["name"], info["before"]) == ("own", done["before"])

    code, stdout, _ = photoblip("reindex", "--model", "own", "--jobs", 0, "--json")
    assert code == 0 and json.loads(stdout)["photos"] == 52 and library.status()["model"] == "own"
    assert photoblip("index", made / "photos", "--model", "own", "--jobs", 0)[0] == 0
    assert photoblip("reindex", "--model", made / "tiny", "--jobs", 0)[0] == 0
    assert library.status()["model"] == str(made / "tiny")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--name", "a/b"), 1, "cannot be called"),
        (("--held-out", "1"), 1, "between 0 and 1"),
        (("--epochs", "none"), 2, "Invalid value"),
        (("--model", "nowhere"), 1, "no model or folder"),
        (("--nonsense",), 2, "No such option"),
    ],
)
def test_mistakes_are_one_sentence_and_no_traceback(photoblip, options, code, words):
    status, stdout, stderr = photoblip("train", "finetune", *options)
    assert (status, stdout) == (code, "") and words in stderr and "Traceback" not in stderr
