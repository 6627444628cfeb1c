"""Indexing a folder end to end: photoblip against the straightforward way, Pillow and transformers in one loop.

Photos are camera files made one size where they are, else drawn ones; weights are blip-mini's, and random ones of
ViT-B/384's shape. Each way runs in a process of its own, in turn, and is timed once its model is loaded.

`--photos-count` 12 MP photos (0: none) also show memory: of photoblip's process and its decoding workers together,
sampled while it indexes them. They are made as they are needed and removed after, so that the disk holds 1,400 (4 GB).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageOps

from tests.benchmarks import photos
from tests.benchmarks.machine import arguments, draw_bars, hush, machine, plotted, publish, table
from tests.tiny import BUNDLED

LARGE, SMALL = (4000, 3000), (500, 375)
CASES = {  # size, model, photos
    "blip-base": (LARGE, "blip-base", 64),
    "blip-mini": (LARGE, "blip-mini", 72),
    "small": (SMALL, "blip-mini", 320),
}
FOLDER, AHEAD, BEHIND = 100, 1200, 200  # photos a folder, made before they are indexed, kept after
EVERY = 0.5  # seconds between two looks at memory

# -- the ways, each in a process of its own ---------------------------------------------------------------------


def naive(folder: Path, model: str) -> float:
    """Pillow's full decode and transformers' float32 forward, photo after photo in batches. -> seconds."""
    import torch
    from transformers import BlipConfig, BlipForImageTextRetrieval

    hush()
    if model == "blip-mini":
        network = BlipForImageTextRetrieval.from_pretrained(BUNDLED)
    else:
        from blipcore.models.presets import PRESETS

        network = BlipForImageTextRetrieval(BlipConfig.from_dict(PRESETS[model]().to_dict()))
    network, side = network.float().eval(), network.config.vision_config.image_size
    files, vectors = sorted(folder.glob("*.jpg")), []
    started = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(files), 32):
            images = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files[start : start + 32]]
            pixels = np.stack([np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images])
            inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            states = network.vision_model(pixel_values=inputs).last_hidden_state[:, 0]
            vectors.append(torch.nn.functional.normalize(network.vision_proj(states), dim=-1).numpy())
    np.concatenate(vectors)
    return time.perf_counter() - started


def ours(folder: Path, model: str) -> float:
    """`photoblip index`, with catalog, thumbnails, hashes, vectors and image tokens. -> seconds."""
    from indexer import PhotoLibrary

    name = model
    with tempfile.TemporaryDirectory() as place:
        if model != "blip-mini":
            name = random_model(Path(place) / "model", model)
        with PhotoLibrary.open(Path(place) / "library", model=name) as library:
            library.encoder()
            started = time.perf_counter()
            report = library.index(folder)
            seconds = time.perf_counter() - started
    if report.added != len(list(folder.glob("*.jpg"))):
        raise SystemExit(f"photoblip indexed {report.added} photos of {folder}: the time says nothing")
    for row in report.times.rows():
        print(f"    {row['stage']} {row['share']:.0%} busy, alone {row['photos_per_second']} photos/s", file=sys.stderr)
    return seconds


def random_model(folder: Path, preset: str) -> str:
    """A model of a published shape with random weights, as a folder."""
    import torch

    from blipcore.checkpoint import save
    from blipcore.models.blip import Blip
    from blipcore.models.presets import PRESETS
    from blipcore.transforms import TextTokenizer

    torch.manual_seed(0)
    tokenizer = TextTokenizer(BUNDLED / "tokenizer.json")
    return str(save(Blip(PRESETS[preset]()), folder, tokenizer, mean=(0.5,) * 3, std=(0.5,) * 3))


WAYS = {"naive": naive, "ours": ours}


def timed(way: str, folder: Path, model: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_indexing", "--way", way, "--folder", str(folder)]
    done = subprocess.run([*command, "--model", model], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


# -- memory -----------------------------------------------------------------------------------------------------


class Supply:
    """A folder whose photos are made before the walk reaches them, and removed once they are indexed.

    The walk lists a folder when it comes to it, and is never further ahead than a query's 500 rows and the decoder's
    window: so all of a folder is there in time.
    """

    def __init__(self, root: Path, pictures: list[Path], count: int):
        self.root, self.pictures, self.count, self.made, self.removed = root, pictures, count, 0, 0
        for number in range(0, count, FOLDER):
            self.path(number).parent.mkdir(parents=True)
        self.indexed(0)

    def path(self, number: int) -> Path:
        return self.root / f"{number // FOLDER:05}" / f"{number:06}.jpg"

    def indexed(self, done: int) -> None:
        while self.made < min(self.count, done + AHEAD):
            picture = self.pictures[self.made % len(self.pictures)].read_bytes()
            self.path(self.made).write_bytes(photos.commented(picture, self.made))
            self.made += 1
        while self.removed < done - BEHIND:
            self.path(self.removed).unlink()
            self.removed += 1


def supplied(folder: Path, count: int) -> None:
    """Index so many photos, each a file of its own content, from the few in a folder; print how many are done."""
    from indexer import PhotoLibrary

    with tempfile.TemporaryDirectory() as place:
        supply = Supply(Path(place) / "photos", sorted(folder.glob("*.jpg")), count)

        def progress(state) -> None:
            supply.indexed(state.done)
            print(state.done, flush=True)

        with PhotoLibrary.open(Path(place) / "library") as library:
            report = library.index(supply.root, progress=progress)
    if report.added != count:
        raise SystemExit(f"photoblip indexed {report.added} of {count} photos: what memory it took says nothing")


def watched(folder: Path, count: int) -> list[dict]:
    """Samples while a process indexes: seconds, photos done, MB resident of it and its workers, MB without files.

    Resident adds up what processes share, so it is an upper bound; without files are pages of no file: the processes'
    own memory, without libraries, weights and databases that the system may drop and read again.
    """
    command = [sys.executable, "-m", "tests.benchmarks.bench_indexing", "--way", "supplied", "--folder", str(folder)]
    samples, started = [], time.perf_counter()
    said = folder.with_name("progress.txt")
    with said.open("w") as written:
        process = subprocess.Popen([*command, "--photos-count", str(count)], stdout=written)
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            resident = own = 0
            for each in family(tree):
                try:
                    memory = each.memory_info()
                except psutil.Error:  # it has just ended
                    continue
                resident += memory.rss
                own += memory.rss - getattr(memory, "shared", 0)
            done = (said.read_text(encoding="utf-8").split("\n")[:-1] or ["0"])[-1]
            samples.append({"s": time.perf_counter() - started, "photos": int(done), "resident": resident / 1e6,
                            "own": own / 1e6})  # fmt: skip
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit("the run that shows memory failed: its message is above")
    return samples


def family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def memory_lines(samples: list[dict], count: int, kind: str) -> list[str]:
    """The peaks, and how much memory grew over the second half of the photos."""
    half = [row for row in samples if row["photos"] >= count / 2] or samples[-2:]
    at = [row["photos"] for row in half]
    growth = {key: np.polyfit(at, [row[key] for row in half], 1)[0] * 1000 if len(set(at)) > 1 else 0.0
              for key in ("resident", "own")}  # fmt: skip
    seconds = samples[-1]["s"]
    rows = [
        (title, *(typical(samples, key, low * count, high * count) for low, high in ((0.1, 0.3), (0.8, 1))),
         f"{max(row[key] for row in samples):,.0f}", f"{growth[key]:.1f}")
        for key, title in (("resident", "resident, MB"), ("own", "of no file, MB"))
    ]  # fmt: skip
    heading = ("memory of all processes", "at 10-30 % of the photos", "at 80-100 %", "peak",
               "growth a 1,000 photos, 2nd half")  # fmt: skip
    return [f"### Memory: {count:,} photos of 12 MP, blip-mini", "",
            f"{kind}; {seconds:.0f} s, {count / seconds:.1f} photos/s with start-up and the making of the photos.", "",
            *table(heading, rows), "![Memory while indexing](indexing-memory.png)", ""]  # fmt: skip


def typical(samples: list[dict], key: str, first: float, last: float) -> str:
    """The median while so many photos were done."""
    held = [row[key] for row in samples if first <= row["photos"] <= last]
    return f"{np.median(held):,.0f}" if held else "-"


def draw_memory(samples: list[dict], file: Path) -> None:
    with plotted(file) as axes:
        done = [row["photos"] for row in samples]
        axes.plot(done, [row["resident"] for row in samples], label="resident, shared pages counted in each process")
        axes.plot(done, [row["own"] for row in samples], label="of no file")
        axes.set(xlabel="photos indexed", ylabel="MB of all processes", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


# -- what is run and shown --------------------------------------------------------------------------------------


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}; nothing: none")
    parser.add_argument("--count", type=int, help="photos of each case, for a trial")
    parser.add_argument("--photos", type=Path, help="a folder or tar of JPEGs, as they are, instead of all sizes")
    parser.add_argument("--photos-count", type=int, default=10_000, help="photos that show memory (10,000)")
    parser.add_argument("--way", choices=[*WAYS, "supplied"], help=argparse.SUPPRESS)  # this program calls itself
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="blip-mini", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way == "supplied":
        supplied(options.folder, options.photos_count)
        return
    if options.way:
        print(WAYS[options.way](options.folder, options.model))
        return
    lines = [f"{machine()}. {options.rounds} rounds.", ""]
    print(lines[0], flush=True)
    rows, groups, samples = [], {}, []
    with tempfile.TemporaryDirectory() as place:
        for case in options.cases:
            size, model, count = CASES[case]
            rows.append(compared(Path(place) / case, size, model, options.count or count, options))
            groups[f"{rows[-1][0]}, {model}"] = {"naive": float(rows[-1][3]), "photoblip": float(rows[-1][4])}
            print(*rows[-1], sep=" | ", flush=True)
        heading = ("photos", "what they are", "model", "naive, photos/s", "photoblip", "ratio, median", "of bests")
        lines += table(heading, rows) if rows else []
        if options.photos_count:
            folder = Path(place) / "memory"
            kind = photos.fill(folder, min(12, options.photos_count), LARGE, options.photos)
            samples = watched(folder, options.photos_count)
            lines += memory_lines(samples, options.photos_count, kind)
    print("\n".join(lines))
    publish(options.out, "indexing", "Indexing", lines,
            (lambda file: draw_bars(groups, "photos/s", file)) if groups else None)  # fmt: skip
    if options.out and samples:
        draw_memory(samples, options.out / "indexing-memory.png")


def compared(folder: Path, size: tuple[int, int], model: str, count: int, options) -> tuple:
    """A row of the table."""
    kind = photos.fill(folder, count, size, options.photos)
    rounds = [{way: count / timed(way, folder, model) for way in WAYS} for _ in range(options.rounds)]
    naive_rate, our_rate = (statistics.median(each[way] for each in rounds) for way in WAYS)
    best_naive, our_best = (max(each[way] for each in rounds) for way in WAYS)
    title = f"{size[0]} x {size[1]}" if not options.photos else "as they are"
    ratio, best = statistics.median(each["ours"] / each["naive"] for each in rounds), our_best / best_naive
    shown = (f"{naive_rate:.1f}", f"{our_rate:.1f}", f"{ratio:.2f}", f"{best:.2f}")
    return f"{count} of {title}", kind, model, *shown


if __name__ == "__main__":
    main()
