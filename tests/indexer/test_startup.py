"""What a command loads: nothing that it does not need, for imports are most of what a command costs."""

import os
import subprocess
import sys

import pytest

from indexer import PhotoLibrary
from tests.indexer.conftest import COLOURS, paint

TRAINING = ("accelerate", "matplotlib", "peft", "pycocoevalcap", "timm", "torchvision")
LANGUAGE_MODELS = ("transformers", "huggingface_hub", "torch._dynamo")
BY_ACCIDENT = ("scipy", "sklearn", "sympy", "pandas", "open_clip", "nltk", "triton")
INDEXING = ("pebble", "pillow_heif", "alembic", "streamlit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A library of two photos, indexed with blip-mini."""
    place = tmp_path_factory.mktemp("startup")
    for name in ("red", "blue"):
        paint(place / "photos" / f"{name}.png", COLOURS[name])
    with PhotoLibrary.open(place / "library") as library:
        library.index(place / "photos", workers=0)
    return place / "library"


def loaded(folder, *arguments) -> set[str]:
    """The modules that a command has loaded at its end."""
    program = f"import sys\nfrom indexer.cli.commands import run\nassert run({list(arguments)}) == 0\n"
    program += "print('loaded', *sys.modules)"
    environment = os.environ | {"PHOTOBLIP_LIBRARY": str(folder), "PHOTOBLIP_SERVE": "never", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [("search", "red"), ("search", "red", "--without", "blue"), ("search", "--image", "{photo}"), ("similar", "1")],
)
def test_a_search_loads_no_framework(folder, arguments):
    arguments = [each.format(photo=folder.parent / "photos" / "red.png") for each in arguments]
    modules = loaded(folder, *arguments, "--json")
    assert modules & {"torch", *TRAINING, *LANGUAGE_MODELS, *BY_ACCIDENT, *INDEXING} == set()


def test_status_loads_neither_models_nor_what_indexing_and_queries_need(folder):
    modules = loaded(folder, "status")
    needless = {"torch", "faiss", "lark", "filelock", "psutil", "rich.progress"}
    assert modules & {*TRAINING, *LANGUAGE_MODELS, *BY_ACCIDENT, *INDEXING, *needless} == set()


def test_an_explanation_loads_no_other_framework(folder, tmp_path):
    modules = loaded(folder, "explain", "1", "red", "--out", str(tmp_path / "maps.png"))
    assert "torch" in modules
    assert modules & {*TRAINING, *LANGUAGE_MODELS, *BY_ACCIDENT} == set()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch's OpenMP is GNU's on Linux")
@pytest.mark.parametrize(
    ("said", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_do_not_spin_for_long_unless_the_user_says_so(said, spins):
    program = "from indexer.cli import _set_up_libraries as set_up; set_up(); import torch"
    kept = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    environment = kept | said | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    told = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert told and set(told) == {spins}
