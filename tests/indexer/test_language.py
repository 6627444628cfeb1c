"""A query that the model cannot read is said so; names that travel, and English, never are."""

import pytest

from blipcore.transforms import TextTokenizer
from indexer.errors import QueryError
from indexer.language import Reading, reading
from tests.fakes import ColourEncoder
from tests.tiny import TOKENIZER

FOREIGN = [
    "zwei Hunde spielen im Schnee",
    "Kinder spielen im Garten",
    "coucher de soleil sur la mer",
    "enfants qui jouent dans le jardin",
    "dos perros en la nieve",
    "niños jugando en el jardín",
    "bambini che giocano in giardino",
    "crianças brincando no jardim",
    "twee honden in de sneeuw",
    "solnedgång vid havet",
    "dzieci bawią się w ogrodzie",
    "bahçede oynayan çocuklar",
    "hoàng hôn trên biển",
    "kaksi koiraa lumessa",
    "západ slunce u moře",
]
ENGLISH = [
    "two dogs playing in the snow",
    "a red car",
    "wedding",
    "dim sum",
    "die cast car",
    "man in hat on main street",
    "selfie in mirror",
    "kids",
    "no parking sign",
    "rose",
    "tennis 2023",
    "log cabin",
    "not a dog",
    "four people at once",
]
NAMES = [
    "Köln", "piñata", "café in Paris", "Zürich", "São Paulo", "crème brûlée", "Neuschwanstein", "Reykjavík",
    "José and María", "dachshund", "Bernese mountain dog", "Angkor Wat", "Sagrada Familia", "Rio de Janeiro",
    "Müller family", "Beyoncé", "smörgåsbord", "jalapeño", "naïve art", "déjà vu", "Fontana di Trevi", "Gdansk",
    "pizza margherita", "Mont Saint Michel", "Santa Cruz beach", "Côte d'Azur beach", "Lake Garda", "IMG 2034",
]  # fmt: skip


class Reader(ColourEncoder):
    """Colours, behind blip-mini's vocabulary."""

    multilingual = False
    tokenizer = TextTokenizer(TOKENIZER)

    def word_pieces(self, text):
        return [(each.word, each.pieces) for each in self.tokenizer.word_pieces(text)]


class ManyLanguages(Reader):
    multilingual = True


# -- another script ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["две собаки в снегу", "雪の中の犬", "كلب في الثلج", "σκύλος στο χιόνι", "눈 속의 개", "חתול"]
)
def test_another_script_is_not_read_and_the_way_out_is_named(text):
    read = reading(text, Reader())
    assert not read.finds and not read.matches
    assert "colours reads English and cannot read" in read.notice
    assert "photoblip models download open_clip:ViT-B-16-SigLIP2" in read.notice


def test_words_of_another_script_among_english_ones_are_named():
    read = reading("snow in 東京", Reader())
    assert read.finds and read.matches and "passes over '東京'" in read.notice


@pytest.mark.parametrize("text", ["🐶", "???", "-"])
def test_what_has_no_word_is_said(text):
    read = reading(text, Reader())
    assert not read.finds and "finds no word in" in read.notice


@pytest.mark.parametrize("text", ["Ω sign", "50 µm", "2023", "photo of André", "naïve", "\uff21", "1º grau", "iPhone"])
def test_signs_numbers_and_accents_are_read(text):
    assert reading(text, Reader()) == Reading()


# -- Latin letters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FOREIGN)
def test_other_languages_in_latin_letters_are_warned_of_and_searched_all_the_same(text):
    read = reading(text, Reader())
    assert read.finds and read.matches and "does not look like it: ask in English" in read.notice


@pytest.mark.parametrize("text", [*ENGLISH, *NAMES])
def test_english_and_names_are_never_warned_of(text):
    assert reading(text, Reader()) == Reading()


def test_english_is_told_without_the_language_detector(monkeypatch):
    monkeypatch.setattr("indexer.language._identifier", lambda: pytest.fail("it takes half a second to load"))
    for text in ("two dogs playing in the snow", "a red car", "wedding", "no parking sign", "tennis 2023"):
        reading(text, Reader())


# -- a first stage of many languages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [*FOREIGN, "две собаки в снегу", "雪の中の犬", "Sonnenuntergang", "🐶", "snow in 東京"]
)
def test_a_model_of_many_languages_finds_and_leaves_matching_out(text):
    assert reading(text, ManyLanguages()) == Reading(finds=True, matches=False)


@pytest.mark.parametrize("text", [text for text in ENGLISH if text != "selfie in mirror"])
def test_a_model_of_many_languages_matches_english(text):
    assert reading(text, ManyLanguages()) == Reading()


# -- in a search ------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(open_library, photos):
    library = open_library(encoder=Reader())
    library.index(photos, workers=0)
    return library


def test_a_query_that_is_not_read_finds_nothing_but_the_words_beside_photos(reader, photos):
    hits = reader.search("красный")
    assert hits == [] and "cannot read 'красный'" in hits.notice
    reader.add_caption(str(photos / "red.png"), "красный квадрат")
    (hit,) = hits = reader.search("красный")
    assert hit.path.endswith("red.png") and hit.itc is None and hit.text_rank == 1 and hits.notice
    assert reader.search("reddish").notice is None


def test_an_example_photo_counts_where_the_words_do_not(reader, photos):
    hits = reader.search("красный", image=photos / "blue.png")
    assert hits[0].path.endswith("blue.png") and hits.notice


def test_words_to_leave_out_must_be_read(reader):
    with pytest.raises(QueryError, match="cannot read 'люди'"):
        reader.search("reddish", without=["люди"])


def test_many_languages_are_not_re_ranked_by_a_model_of_english(open_library, photos):
    library = open_library(encoder=ManyLanguages())
    library.index(photos, workers=0)
    foreign, english = library.search("reddish трава"), library.search("reddish")
    assert foreign.reranked == 0 and foreign[0].path.endswith("red.png") and foreign.notice is None
    assert english.reranked == 4


def test_the_command_warns_on_stderr(photos, tmp_path, monkeypatch, capsys):
    from indexer.cli.commands import run

    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("PHOTOBLIP_SERVE", "never")
    monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: Reader())
    assert run(["index", str(photos), "--jobs", "0"]) == 0
    capsys.readouterr()
    assert run(["search", "красный", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "cannot read" in err
