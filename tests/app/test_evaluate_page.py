"""The evaluate page: figures from the library's own captions, earlier reports, two models compared."""

import json

from app import state
from tests.app.test_library_page import finish
from tests.app.test_pages import (  # fixtures among them
    button,
    empty_library,  # noqa: F401
    folder,  # noqa: F401
    html,
    library,  # noqa: F401
    open_page,
)
from tests.fakes import ColourEncoder


def caption_all(library, folder) -> None:  # noqa: F811
    for name, words in (("rose", "a red thing"), ("meadow", "a green thing"), ("sea", "a blue thing")):
        library.add_caption(folder / f"{name}.png", words)


def test_without_captions_the_way_to_some_is_said(library):  # noqa: F811
    assert "no captions of yours" in open_page("evaluate").info[0].value


def test_own_captions_give_recall_and_latency_of_each_way(library, folder):  # noqa: F811
    caption_all(library, folder)
    app = button(open_page("evaluate"), "Evaluate").click().run()
    finish(app, "evaluate")
    table = app.dataframe[0].value
    assert table.loc["Vectors", "r1"] == 100
    assert table.loc["Words", "r1"] == 0, "the words of the caption itself do not count"
    assert (table["p99_ms"] >= table["p50_ms"]).all()
    assert any("3 queries" in text.value for text in app.caption)
    assert len(list(library.paths.reports.glob("*.json"))) == 1


def test_earlier_reports_are_shown_and_one_that_cannot_be_read_is_left_out(library, folder):  # noqa: F811
    caption_all(library, folder)
    report = library.evaluate()
    older = report.as_dict() | {"at": "2020-01-01T00:00:00+00:00"}
    (library.paths.reports / "evaluation-2020-01-01T000000+0000.json").write_text(json.dumps(older))
    (library.paths.reports / "evaluation-2021.json").write_text("{no json")
    app = open_page("evaluate")
    assert len(app.dataframe[1].value) == 2


def test_one_model_cannot_be_compared_and_the_way_to_a_second_is_said(library):  # noqa: F811
    app = open_page("evaluate")
    assert any("library page" in text.value for text in app.caption)


def test_two_models_are_compared_on_typed_queries(library, folder, monkeypatch):  # noqa: F811
    encoders = {"colours": ColourEncoder(), "others": ColourEncoder("others", "07e5" * 4)}
    load = lambda name: encoders.get(name, encoders["colours"])  # noqa: E731
    monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: load(name))
    monkeypatch.setattr(library, "_load_encoder", load)
    library.reindex("others", workers=0, switch=False)
    app = open_page("evaluate")
    button(app, "Compare").click().run()
    assert "Type a query" in app.warning[0].value
    app.text_area(key="compare-queries").set_value("red\nblue\n")
    button(app, "Compare").click().run()
    finish(app, "compare")
    assert state.task("compare").look().phase == "done", state.task("compare").look().error
    drawn = html(app)
    assert "<dt>Rank-biased overlap</dt><dd>1.00</dd>" in drawn
    assert "<dd>100%</dd>" in drawn
