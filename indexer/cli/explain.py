"""`photoblip explain`: where a photo shows the words of a text."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from indexer.cli.common import AsJson, Library, emit, open_library, out, refuse_photo, save_picture


def explain(
    photo: Annotated[str, typer.Argument(help="A photo's id or path.")],
    words: Annotated[str, typer.Argument(help="What was searched for.")],
    word: Annotated[list[str] | None, typer.Option(help="Only this word or phrase; repeat it.")] = None,
    file: Annotated[Path | None, typer.Option("--out", help="Draw the heat maps into this image file.")] = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Why a photo matches: each word's part in what the matching model believes, and where it looks for it.

    The place is the hottest one, in parts of the photo's width from the left and of its height from the top. A word
    that is not among WORDS is read by itself.
    """
    with open_library(library) as opened:
        refuse_photo(opened, file)
        photo_id = opened.photo_id(photo)
        maps = [opened.explain(photo_id, words, each) for each in word] if word else opened.explain(photo_id, words)
        if file:
            save_picture(opened.draw_heat(photo_id, maps, words), file)
    total = sum(each.strength for each in maps) or 1.0
    for each in maps:
        share, (x, y) = each.strength / total, each.peak
        if as_json:
            emit(
                {"photo_id": photo_id, "word": each.word, "share": round(share, 4), "x": round(x, 3), "y": round(y, 3)}
            )
        else:
            out.print(f"{share:5.0%}  {x:.2f} {y:.2f}  {escape(each.word)}", soft_wrap=True)
