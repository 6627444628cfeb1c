"""The search box: what stays a plain sentence, what is understood, and what an error says."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from indexer.errors import QueryError
from indexer.filters import FIELDS, Phrase
from indexer.query import MAX_BOX, Query, Term


def asked(box):
    """(terms as (weight, what), without, filters as text)"""
    query = Query.parse(box)
    terms = [(term.weight, term.text if term.text is not None else term.photo) for term in query.terms]
    return terms, list(query.without), [str(where) for where in query.where]


@pytest.mark.parametrize(
    "sentence",
    [
        "two dogs playing in the snow",
        "a man, smiling, in a t-shirt",
        "well-known rock-n-roll singer",
        "the 10:30 train at 5:pm",
        "a 16:9 photo; blurry",
        "note: a dog",
        "title: the kiss",
        "1,000 people",
        "-5 degrees outside",
        "C++ and A+ students",
        "AT&T, 50% off!",
        "E=mc2 on a blackboard",
        "i <3 dogs",
        "cats > dogs",
        "a = b",
        "what's that? (a dog)",
        "rock & roll (live)",
        "DOGS AND CATS OR NOT",
        "TRUE OR FALSE",
        "no",
        "no parking",
        "no parking sign",
        "not a dog",
        "a no skiing sign",
        "Protesters with NO NEW COAL signs",
        "I have no idea!",
        "living without",
        "but not",
        "A man without a shirt is climbing a rock",
        "A man wearing no shirt climbs a cliff",
        "a man with no shirt on is holding a football",
        'a 12" record',
        "https://example.org/a?b=c",
        "photo: the best one",
        "photo:sunset",
        "/r/aww dogs",
        "1/2 pizza",
        "and/or",
        "日本の犬 🐕",
        "'golden gate'",
        "l'été à la plage",
    ],
)
def test_a_plain_sentence_stays_what_it_is(sentence):
    assert asked(sentence) == ([(1, sentence)], [], [])


def test_spaces_between_words_do_not_matter():
    assert asked("  two\n dogs\t ") == ([(1, "two dogs")], [], [])


@pytest.mark.parametrize(
    ("box", "terms", "without"),
    [
        ("red car, no people", [(1, "red car")], ["people"]),
        ("red car,no people, at night", [(1, "red car, at night")], ["people"]),
        ("dogs without people", [(1, "dogs")], ["people"]),
        ("dogs without any people.", [(1, "dogs")], ["people"]),
        ("a beach but not a sunset", [(1, "a beach")], ["a sunset"]),
        ("shorts but no shirt", [(1, "shorts")], ["shirt"]),
        ("cats, not dogs", [(1, "cats")], ["dogs"]),
        ("a man rock climbing without a rope", [(1, "a man rock climbing")], ["a rope"]),
        ("no people, beach", [(1, "beach")], ["people"]),
        ("beach, no people, no cars", [(1, "beach")], ["people", "cars"]),
        ("street, no one", [(1, "street")], ["people"]),
        ("street, nobody", [(1, "street")], ["people"]),
        ("no people, no cars", [], ["people", "cars"]),
        ("beach -people sunset", [(1, "beach sunset")], ["people"]),
        ("beach - many people", [(1, "beach")], ["many people"]),
        ("beach WITHOUT People", [(1, "beach")], ["People"]),
    ],
)
def test_what_is_left_out(box, terms, without):
    assert asked(box) == (terms, without, [])


@pytest.mark.parametrize(
    ("box", "terms"),
    [
        ("2:golden retriever + snow", [(2, "golden retriever"), (1, "snow")]),
        ("beach - 0.5:grass", [(1, "beach"), (-0.5, "grass")]),
        ("beach + .5:dogs, 3:cats", [(1, "beach"), (0.5, "dogs"), (3, "cats")]),
        ("+ beach", [(1, "beach")]),
        ("photo:123", [(1, 123)]),
        ("photo:123 at night", [(1, "at night"), (1, 123)]),
        ("2:photo:12 - photo:13", [(2, 12), (-1, 13)]),
        ("~/a/query.jpg, at night", [(1, "at night"), (1, "~/a/query.jpg")]),
        ('photo:"/a b/c.jpg" + cat', [(1, "/a b/c.jpg"), (1, "cat")]),
        (r"C:\Pictures\dog.PNG", [(1, r"C:\Pictures\dog.PNG")]),
    ],
)
def test_weighted_sums_of_words_and_photos(box, terms):
    assert asked(box) == (terms, [], [])


@pytest.mark.parametrize(
    ("box", "said", "filters"),
    [
        ("dogs year=2023 album:Spain", "dogs", ["year=2023 album:Spain"]),
        ("year=2023 dogs, format=PNG", "dogs", ["year=2023", "format=PNG"]),
        ("dogs taken >= 2023-06 in grass", "dogs in grass", ["taken >= 2023-06"]),
        ("dogs (tag=a OR tag=b) on grass", "dogs on grass", ["(tag=a OR tag=b)"]),
        ("dogs AND NOT (year=2023)", "dogs", ["NOT (year=2023)"]),
        ("near=48.85,2.35,10km, dogs", "dogs", ["near=48.85,2.35,10km"]),
        ("(a dog) (year=2023)", "(a dog)", ["(year=2023)"]),
        ('folder="/a b/c" cats', "cats", ['folder="/a b/c"']),
        ('cats answer("how many people?") > 2', "cats", ['answer("how many people?") > 2']),
        ("-tag:blurry dogs", "dogs", ["NOT (tag:blurry)"]),
        ("dogs without tag:blurry", "dogs", ["NOT (tag:blurry)"]),
        ("year=2023", None, ["year=2023"]),
        ('"golden gate" at dawn', "golden gate at dawn", ['"golden gate"']),
        ("“Golden  Gate” at dawn", "Golden Gate at dawn", ['"golden gate"']),
        ('"IMG_1234"', "IMG_1234", ['"img 1234"']),
        ('bridge -"golden gate"', "bridge", ['NOT "golden gate"']),
        ('bridge, not "golden gate"', "bridge", ['NOT "golden gate"']),
    ],
)
def test_filters_and_quoted_words_stand_among_the_words(box, said, filters):
    query = Query.parse(box)
    assert (query.text and " ".join(query.text.split()), [str(where) for where in query.where]) == (said, filters)


def test_a_filter_beside_an_exclusion():
    assert asked("year=2023 no people") == ([], ["people"], ["year=2023"])
    assert asked("dogs without people year=2023") == ([(1, "dogs")], ["people"], ["year=2023"])
    assert asked("year=2023 NOT people") == ([], ["people"], ["year=2023"])


def test_keywords_mean_the_same_as_the_box():
    beside = Query.parse("dogs", images=[12], without=["people", " "], where="year=2023")
    assert beside.terms == (Term(text="dogs"), Term(photo=12)) and beside.photo_ids == (12,)
    assert beside.without == Query.parse("dogs without people").without == ("people",)
    assert beside.where == ("year=2023",)


def test_only_quoted_words_make_an_exact_query():
    assert Query.parse('"IMG_1234"').is_exact and Query.parse('"golden gate" year=2023').is_exact
    assert not Query.parse('"golden gate" at dawn').is_exact
    assert not Query.parse('-"golden gate"').is_exact and not Query.parse("year=2023").is_exact


def test_a_query_says_how_it_was_understood():
    box = "2:dogs + photo:3 - 0.5:grass, no people year=2023 -tag:x"
    assert Query.parse(box).summary() == (
        "2:dogs + photo 3 + -0.5:grass; leaving out: people; where: year=2023 AND NOT (tag:x)"
    )
    assert Query.parse("dogs", where={"year": 2023}).summary() == "dogs; where: year=2023"


@pytest.mark.parametrize(
    ("box", "position", "why"),
    [
        ("dogs +", 6, "missing here"),
        ("dogs + , cats", 7, "missing here"),
        ("+ - dogs", 2, "missing here"),
        ('say "hello', 4, "quotation mark is not closed"),
        ('dogs ""', 5, "no word between"),
        ("colour=red dogs", 0, "no filter 'colour'"),
        ("dogs year=", 5, "a value is missing"),
        ("dogs year=soon", 10, "year needs a number"),
        ("dogs OR year=2023", 5, "OR stands between filters"),
        ("year=2023 OR dogs", 10, "OR stands between filters"),
        ("dogs (year=2023 AND) format=PNG", 19, "a filter looks like"),
        ("dogs " + "NOT " * 21 + "year=1", 85, "more than 20 NOT"),
        ("0:dogs", 0, "a weight is more than 0"),
        ("dogs + 101:cats", 7, "a weight is more than 0"),
        ('photo:"here.jpg"', 0, "its whole path"),
        ("photo:99999999999999999999", 0, "so high a number"),
        ("x" * (MAX_BOX + 1), MAX_BOX, "shorten it"),
    ],
)
def test_an_error_points_at_the_place(box, position, why):
    with pytest.raises(QueryError, match=why) as caught:
        Query.parse(box)
    assert caught.value.position == position
    if position < MAX_BOX:
        assert f">>>{box[position : position + 40]}" in str(caught.value)
        assert f"at position {position + 1}: " in str(caught.value)


def test_a_query_needs_something_to_look_for():
    for box in (None, "", " \n"):
        with pytest.raises(QueryError, match="give words, a photo, or both"):
            Query.parse(box)
    with pytest.raises(QueryError, match="add what to look for"):
        Query.parse("- 0.5:dogs")
    assert Query.parse(None, images=["a.jpg"]).text is None


PIECES = """
    dogs no not without but nobody NOT AND OR ( ) , ; + - -x 2: 2:cat 0.5:x " “ ” photo:12 photo: /a.jpg
    answer( year= year=2023 tag:a = != > : . é 犬 \x00 x=1
"""
TOKENS = st.sampled_from([*PIECES.split(), "but not", '"a b"', 'answer("how?") > 2', "\n", *FIELDS])
BOXES = st.one_of(
    st.text(max_size=60),
    st.lists(TOKENS, max_size=12).flatmap(lambda parts: st.sampled_from(["", " "]).map(lambda gap: gap.join(parts))),
)


@settings(max_examples=400, deadline=None)
@given(BOXES)
@example("((((year=2023))))")
@example("NOT NOT NOT year=2023")
@example(")year=2023(")
@example("- " * 50)
def test_no_text_crashes_the_box(box):
    try:
        query = Query.parse(box)
    except QueryError as error:
        assert str(error) and (error.position is None or 0 <= error.position <= len(box))
        assert error.position is not None or str(error).startswith(("nothing to search for", "there are only"))
    else:
        assert query.summary()
        assert all(isinstance(term.weight, float) and (term.text or term.photo is not None) for term in query.terms)


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[A-Za-z][a-z']{0,9}", fullmatch=True), min_size=1, max_size=12))
def test_words_without_signs_are_never_changed(sentence):
    words = [word for word in sentence if word.lower() not in {"no", "not", "without", "but", "nobody"}]
    if words and "AND" not in words:
        assert asked(" ".join(words)) == ([(1, " ".join(words))], [], [])


def test_phrases_are_values():
    assert Query.parse('"a b"').where == (Phrase(("a", "b")),) and Query.parse("dogs") == Query.parse(" dogs ")
