"""Heat maps: do they point at the right photo of two, and what do they cost beside matching?

    python -m tests.benchmarks.bench_explain [MODEL] [--pairs 400] [--split test]

Flickr8k: a caption of one photo, and a noun of it that people wrote more than once about this photo and never, nor a
word close to it, about the other. Caltech-101: "a photo of a CLASS", every other class (the rest were for choosing).
"""

import argparse
import csv
import io
import random
import re
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from blipcore import load
from indexer.demo import copy_demo_photos
from tests.benchmarks.machine import machine, show, versus
from tests.pointing import Pair, point, rates, side_by_side
from tests.tiny import SHARED_DATA

DEMO = {  # a text and a word of it for each of the demo's photos of things
    "cat.png": ("a cat", "cat"),
    "coffee.png": ("a cup of coffee", "coffee"),
    "motorcycle.png": ("a red motorcycle", "motorcycle"),
    "rocket.jpg": ("a rocket", "rocket"),
    "astronaut.png": ("a smiling woman", "woman"),
    "photographer.png": ("a man with a camera", "man"),
    "temple.jpg": ("a temple among trees", "temple"),
    "flower.jpg": ("an orange flower", "flower"),
    "grass.png": ("green grass", "grass"),
}
NOUNS = """
dog man boy girl woman child water snow beach grass bike ball car street field mountain rock tree pool ocean people
skateboard skateboarder snowboarder surfer wave horse sand bicycle motorcycle baby climber cliff swing soccer football
basketball tennis umbrella building crowd bench cat bird river fence skier hill bridge fountain slide trampoline guitar
truck boat camera hat wall track helmet dirt road biker racer player kayak sled swimmer trail lake leaves frisbee stick
toy rope flag sidewalk table
"""
CLOSE = [  # words of which one may stand for another, or be seen with it: a photo with one is none without the others
    set(group.split())
    for group in (
        "man boy woman girl child people person baby kid men women player biker skier surfer climber racer swimmer "
        "skateboarder snowboarder crowd",
        "water ocean river lake pool wave beach fountain",
        "snow hill mountain",
        "bike bicycle motorcycle biker racer",
        "street road sidewalk car track trail dirt field grass",
        "rock cliff mountain hill",
        "sand beach",
        "ball soccer football basketball tennis player",
        "tree leaves",
    )
]


def flickr_pairs(split: str, count: int, seed: int = 0) -> Iterator[Pair]:
    """Photos of a split with a caption of one of them, and a noun that only this one's captions have."""
    captions = defaultdict(list)
    with (SHARED_DATA / "flickr8k" / "captions.tsv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            captions[row["file"]].append(row["caption"])
    photos, draw = read_photos(SHARED_DATA / "flickr8k" / f"{split}.tar"), random.Random(seed)
    names, nouns, found = sorted(photos), set(NOUNS.split()), 0
    while found < count:
        name, other = draw.sample(names, 2)
        text = draw.choice(captions[name])
        often = Counter(word for caption in captions[name] for word in set(words(caption)))
        elsewhere = {
            part for caption in captions[other] for word in words(caption) for part in (word, word.rstrip("s"))
        }
        told = (word for word in words(text) if word in nouns and often[word] >= 2 and not is_there(word, elsewhere))
        if word := next(told, None):
            found += 1
            yield Pair(picture(photos[name]), picture(photos[other]), text, word)


def caltech_pairs(count: int, seed: int = 0) -> Iterator[Pair]:
    """Photos of two classes, each the second of two in the order of their names."""
    classes = defaultdict(list)
    for name, data in read_photos(SHARED_DATA / "caltech101" / "photos.tar").items():
        classes[name.split("/")[0]].append(data)
    names = sorted(set(classes) - {"BACKGROUND_Google", "Faces", "Faces_easy"})[1::2]
    draw = random.Random(seed)
    for _ in range(count):
        one, other = draw.sample(names, 2)
        word = one.replace("_", " ").replace("lilly", "lily")
        text = f"a photo of a {word}"
        yield Pair(picture(draw.choice(classes[one])), picture(draw.choice(classes[other])), text, word.lower())


def demo_pairs(folder: Path) -> Iterator[Pair]:
    """Each of the demo's things beside each other one, on both sides."""
    copy_demo_photos(folder)
    photos = {name: Image.open(folder / name) for name in DEMO}
    for name, (text, word) in DEMO.items():
        for other in DEMO:
            if other != name:
                yield Pair(photos[name], photos[other], text, word)
                yield Pair(photos[name], photos[other], text, word)


def read_photos(archive: Path) -> dict[str, bytes]:
    """The files of a tar by their names in it, without its own folder."""
    with tarfile.open(archive) as members:
        files = [(member.name, members.extractfile(member).read()) for member in members if member.isfile()]
    return {
        "/".join(Path(name).parts[-2:] if archive.stem == "photos" else Path(name).parts[-1:]): d for name, d in files
    }


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def is_there(word: str, elsewhere: set[str]) -> bool:
    """Whether the other photo's captions speak of the word, or of something that may stand for it."""
    return word in elsewhere or any(word in group and group & elsewhere for group in CLOSE)


def told_apart(encoder, pairs: list[Pair]) -> float:
    """How often the matching model itself finds the text likelier with the right photo alone than with the other."""
    margins = [encoder.match([pair.fits, pair.other], [pair.text]) for pair in pairs]
    return float(np.mean([first > second for first, second in margins]))


def report(name: str, encoder, pairs: list[Pair]) -> None:
    most, peak, energy = rates(point(encoder, pairs))
    print(
        f"{name:28} {len(pairs):4} pairs  most weight {most:.1%}  hottest patch {peak:.1%}  mean weight {energy:.1%}  "
        f"(matching tells the two photos apart in {told_apart(encoder, pairs):.1%})",
        flush=True,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", nargs="?", default="blip-mini")
    options.add_argument("--pairs", type=int, default=400)
    options.add_argument("--split", default="test")
    asked = options.parse_args()
    encoder = load(asked.model)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        report("the demo's photos", encoder, list(demo_pairs(Path(folder))))
    if SHARED_DATA.exists():
        report(f"Flickr8k {asked.split}", encoder, list(flickr_pairs(asked.split, asked.pairs)))
        report("Caltech-101, other classes", encoder, list(caltech_pairs(asked.pairs)))
    photo = side_by_side(Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue"))
    text = "two dogs are playing with a ball in the snow"
    times = versus({
        "match, the photo read": lambda: encoder.match([photo], [text]),
        "heat maps of all words": lambda: encoder.explain(photo, text),
    })  # fmt: skip
    show("one photo and one text", times)


if __name__ == "__main__":
    main()
