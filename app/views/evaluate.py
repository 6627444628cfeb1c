"""The evaluate page: how well this library is searched, on the captions that people wrote; and two models compared."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

from app import components, running, state
from app.texts import _, _n, marked, number
from indexer.comparison import Comparison
from indexer.errors import LibraryError
from indexer.evaluate import own_queries
from indexer.jobs import Progress

LIMITS, RERANK = (50, 200, 1000, 0), (0, 50, 100, 200)
TICKS = [0, 25, 50, 75, 100]
COLOURS = ["#7b8c99", "#c77d1e", "#7b6fd0", "#2f8fa8"]  # read well on white and on black
REPORTS = 50  # earlier evaluations that the curve shows
CHANNELS = {
    "itc": marked("Vectors"),
    "text": marked("Words"),
    "fused": marked("Both"),
    "reranked": marked("Re-ranked"),
}
FIGURES = {  # of indexer.evaluate.Figures: what a column says, and how
    "r1": (marked("Recall@1"), "%.1f %%"),
    "r5": (marked("Recall@5"), "%.1f %%"),
    "r10": (marked("Recall@10"), "%.1f %%"),
    "mrr": (marked("MRR"), "%.3f"),
    "ndcg10": (marked("nDCG@10"), "%.3f"),
    "p50_ms": (marked("Median"), "%.0f ms"),
    "p99_ms": (marked("99 %"), "%.0f ms"),
}


def page() -> None:
    if not state.library().latest(1):
        components.empty_library()
        return
    st.subheader(_("How well is this library searched?"))
    st.caption(
        _(
            "Captions that you wrote are the queries; the photo each was written for should be found. "
            "Its own words are hidden from the full text meanwhile."
        )
    )
    queries = len(own_queries(state.library().catalog)[0])
    if queries:
        st.fragment(measure, run_every=1 if running.active(["evaluate"]) else None)(queries)
    else:
        st.info(_("There are no captions of yours yet: write some on the pages of photos."), icon=":material/info:")
    held = reports(state.library().paths.reports)
    if held:
        latest(held[-1])
        history(held)
    st.subheader(_("Compare two models"))
    st.fragment(compare, run_every=1 if running.active(["compare"]) else None)(queries)


# -- recall and latency -------------------------------------------------------------------------------------


def measure(queries: int) -> None:
    running.redraw_when_changed("evaluate-active", running.active(["evaluate"]))
    held = running.task_bar("evaluate", _("Asking"), _("queries/s"), stop=_("Stop"))
    running.failure(held)
    if held.active:
        return
    with st.form("evaluate", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        limits = [limit for limit in LIMITS if limit < queries]
        limit = st.selectbox(
            _("Queries"),
            limits,
            index=min(1, len(limits) - 1),
            format_func=lambda count: number(count) if count else _("all {count}").format(count=number(queries)),
            width=160,
        )
        rerank = st.selectbox(
            _("Candidates re-ranked"), RERANK, index=2, format_func=lambda n: str(n) if n else _("none"), width=160
        )
        sent = st.form_submit_button(_("Evaluate"), type="primary", icon=":material/monitoring:")
    if sent:
        photos = state.library()
        start(
            "evaluate",
            lambda step: photos.evaluate(limit=limit or None, rerank=rerank, progress=counted(step)),
        )


def counted(step: Callable[[Progress], None]) -> Callable[[int, int], None]:
    return lambda done, total: step(Progress(done, total, 0))


def start(kind: str, work: Callable) -> None:
    try:
        state.task(kind).start([], work)
    except LibraryError as error:
        components.problem(error)
        return
    st.rerun()


def reports(folder: Path) -> list[dict]:
    """Saved reports, the oldest first; a file that is none is left out."""
    held = []
    for file in sorted(folder.glob("evaluation-*.json"))[-REPORTS:]:
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            held += [report] if report["channels"] else []
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return held


def latest(report: dict) -> None:
    counts = _n("{count} query", "{count} queries", report["queries"])
    photos = _n("{count} photo", "{count} photos", report["photos"])
    when = report["at"].replace("T", " ").split("+")[0]
    model = components.model_name(report["model"])
    st.caption(components.plain(f"{model} · {counts} · {photos} · {when} UTC"))
    table = pd.DataFrame(
        [{"way": _(CHANNELS[name]), **figures} for name, figures in report["channels"].items() if name in CHANNELS]
    ).set_index("way")
    columns = {name: st.column_config.NumberColumn(_(label), format=form) for name, (label, form) in FIGURES.items()}
    columns["way"] = st.column_config.TextColumn(_("Found by"))
    st.dataframe(table[list(FIGURES)], column_config=columns, alt=_("Recall and latency of each way of searching"))
    recall, latency = st.columns(2, gap="large")
    with recall:
        st.caption(_("Recall: percent of queries whose photo is among the first k"))
        st.altair_chart(recall_curves(table))
    with latency:
        st.caption(_("Milliseconds until the results are there: the bar is the median, the mark the slowest 1 %"))
        st.altair_chart(latency_bars(table))


def recall_curves(table: pd.DataFrame) -> alt.Chart:
    curve = table[["r1", "r5", "r10"]].set_axis([1, 5, 10], axis=1).reset_index().melt("way", var_name="k")
    return (
        alt.Chart(curve, height=260)
        .mark_line(point=True, strokeWidth=3)
        .encode(
            x=alt.X("k:Q", title="k", axis=alt.Axis(values=[1, 5, 10])),
            y=alt.Y("value:Q", title=_("Recall, %"), scale=alt.Scale(domain=[0, 105]), axis=alt.Axis(values=TICKS)),
            color=alt.Color("way:N", title=None, sort=list(table.index), scale=alt.Scale(range=COLOURS)),
            tooltip=["way", "k", "value"],
        )
    )


def latency_bars(table: pd.DataFrame) -> alt.LayerChart:
    base = alt.Chart(table.reset_index(), height=260).encode(
        y=alt.Y("way:N", title=None, sort=list(table.index)),
        color=alt.Color("way:N", legend=None, sort=list(table.index), scale=alt.Scale(range=COLOURS)),
        tooltip=["way", "p50_ms", "p99_ms"],
    )
    bars = base.mark_bar(height=18).encode(x=alt.X("p50_ms:Q", title="ms"))
    return bars + base.mark_tick(thickness=3, size=24).encode(x=alt.X("p99_ms:Q", title="ms"))


def history(held: list[dict]) -> None:
    """Recall@1 over the evaluations of this library: what a fine-tuning or another model brought."""
    if len(held) < 2:
        return
    with st.expander(_("Earlier evaluations"), icon=":material/history:"):
        rows = [
            {
                _("When"): report["at"].replace("T", " ").split("+")[0],
                _("Model"): components.model_name(report["model"]),
                _("Queries"): report["queries"],
                **{_(CHANNELS[name]): found["r1"] for name, found in report["channels"].items() if name in CHANNELS},
            }
            for report in held
        ]
        table = pd.DataFrame(rows)
        ways = [name for name in map(_, CHANNELS.values()) if name in table]
        st.line_chart(table.set_index(_("When"))[ways], y_label=_("Recall@1"), height=220)
        st.dataframe(table, hide_index=True, alt=_("Earlier evaluations"))


# -- two models ---------------------------------------------------------------------------------------------


def compare(queries: int) -> None:
    running.redraw_when_changed("compare-active", running.active(["compare"]))
    held = running.task_bar("compare", _("Asking both models"))
    running.failure(held)
    if held.active:
        return
    photos = state.library()
    complete = [model.name for model in photos.models() if model.photos and not model.missing]
    if len(complete) < 2:
        st.caption(
            _("One model has vectors of every photo here; a second one gets them on the library page, under Models.")
        )
        st.page_link(components.LIBRARY, label=_("Models"), icon=":material/folder_open:")
        return
    with st.form("compare", border=False):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            name = components.model_name
            first = st.selectbox(_("First model"), complete, format_func=name, width=240)
            second = st.selectbox(_("Second model"), complete, index=1, format_func=name, width=240)
        lines = st.text_area(
            _("Queries, one a line; empty: your captions"), key="compare-queries", max_chars=20_000, height=100
        )
        sent = st.form_submit_button(_("Compare"), icon=":material/compare_arrows:")
    if sent and first == second:
        st.warning(_("Choose two different models."))
    elif sent and not lines.strip() and not queries:
        st.warning(_("Type a query, or write captions first."))
    elif sent:
        start("compare", lambda step: compared(first, second, lines))
    if held.phase == "done":
        show_comparison(held.result)


def compared(first: str, second: str, lines: str) -> Comparison:
    """Both models asked the lines, or the library's own captions."""
    photos = state.library()
    if not lines.strip():
        asked = own_queries(photos.catalog, 200)[0]
        lines = "\n".join(f"{' '.join(one.text.split())}\t{min(one.photo_ids)}" for one in asked)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "queries.txt"
        file.write_text(lines, encoding="utf-8")
        return photos.compare_models(first, second, file)


def show_comparison(result: Comparison) -> None:
    summary, names = result.summary(), [components.model_name(name) for name in result.models]
    shown = {
        _("Queries"): number(summary["queries"]),
        _("Common photos among the first {k}").format(k=result.k): f"{summary['overlap']:.0%}",
        _("Rank-biased overlap"): f"{summary['rbo']:.2f}",
    }
    for name, recall in zip(names, summary["recall"], strict=True):
        if recall:
            shown[f"{_('Recall@1')} · {name}"] = f"{recall['r1']:.1f} %"
    cells = "".join(
        f"<div><dt>{components.escape(name)}</dt><dd>{components.escape(value)}</dd></div>"
        for name, value in shown.items()
    )
    st.html(f'<dl class="pb-numbers">{cells}</dl>')
    st.caption(_("Where they differ most"))
    rows = [
        {
            _("Query"): row.query,
            _("Common"): row.overlap,
            **{f"{_('Rank')} · {name}": rank for name, rank in zip(names, row.ranks, strict=True)},
        }
        for row in sorted(result.rows, key=lambda row: row.rbo)[:50]
    ]
    st.dataframe(rows, hide_index=True, alt=_("Where they differ most"))


page()
