"""Other programs that index photos for search by words, each from the registry into an environment of its own.

No model is downloaded: each gets random weights of the architecture that it would download, made here, which cost it
what trained ones do. What it does with them is its own code, by its own command.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

QUIET = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONWARNINGS": "ignore"}


class Unavailable(Exception):
    """A peer cannot be installed or run: one sentence that says why."""


@dataclass(frozen=True)
class Peer:
    """A program to index photos with.

    Attributes:
        name, shown: as the registry and as the table call it. requirements: what is installed.
        make_model: called with the peer's folder: writes weights below it, once.
        index: called with the peer's folder, a folder of photos and an empty one: indexes. -> photos that it then has.
    """

    name: str
    shown: str
    requirements: tuple[str, ...]
    make_model: Callable[[Path], None]
    index: Callable[[Path, Path, Path], int]

    def prepare(self, cache: Path) -> Path:
        """Install it and make its weights, where that is not done. -> its folder. Raises Unavailable."""
        folder = cache / self.name
        done, wanted = folder / "installed.txt", "\n".join(self.requirements)
        if not done.exists() or done.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            install(folder / "venv", self.requirements)
            self.make_model(folder)
            done.write_text(wanted, encoding="utf-8")
        return folder


def called(command: list, **options) -> str:
    """Run a command to its end. -> what it printed. Raises Unavailable with its last line where it fails."""
    environment = os.environ | QUIET | options.pop("environment", {})
    done = subprocess.run(
        list(map(str, command)), check=False, env=environment, capture_output=True, text=True, **options
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1].strip()
        raise Unavailable(f"`{Path(command[0]).name} {command[1]}` failed: {said}")
    return done.stdout


def uv() -> str | None:
    """The `uv` beside this Python, or the one on the path."""
    return shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def install(environment: Path, requirements: tuple[str, ...], target: Path | None = None) -> None:
    """Make a virtual environment of this Python's version with these packages, by uv or else by pip.

    Args:
        target: packages go to this folder instead, without what they depend on.
    """
    python, tool = environment / "bin" / "python", uv()
    if not python.exists():
        called([tool, "venv", "--quiet", "--python", sys.executable, environment] if tool
               else [sys.executable, "-m", "venv", environment])  # fmt: skip
    where = ["--target", target, "--no-deps"] if target else []
    called([tool, "pip", "install", "--quiet", "--python", python, *where, *requirements] if tool
           else [python, "-m", "pip", "install", "--quiet", *where, *requirements])  # fmt: skip


def by_child(name: str, *given: Path, path: Path | None = None) -> None:
    """Call a function of this module in another process: it imports PyTorch, and perhaps packages of a folder."""
    code = (
        "import sys, pathlib; from tests.benchmarks import peers; " + f"peers.{name}(*map(pathlib.Path, sys.argv[1:]))"
    )
    called([sys.executable, "-c", code, *given], environment={"PYTHONPATH": str(path)} if path else {})


# -- rclip ------------------------------------------------------------------------------------------------------

RCLIP_MODEL = "ViT-B-32-256-datacomp_s34b_b86k"  # where rclip looks for its files: rclip/model_download.py
RCLIP_SIDE, RCLIP_TOKENS = 256, 77


def make_rclip_model(folder: Path) -> None:
    install(folder / "venv", ("onnx", "ml_dtypes"), target=folder / "export")  # PyTorch's exporter needs it
    by_child("export_rclip_model", folder / "data", path=folder / "export")
    shutil.rmtree(folder / "export")


def export_rclip_model(folder: Path) -> None:
    """Both towers of open_clip's ViT-B-32-256 in float32 ONNX, with the input and output names that rclip asks for."""
    import open_clip
    import torch

    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model.encode_text(ids)

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-256").eval()
    (folder / RCLIP_MODEL).mkdir(parents=True)
    example = torch.zeros(1, 3, RCLIP_SIDE, RCLIP_SIDE)
    for name, tower, read in (
        ("visual", model.visual, example),
        ("textual", Words().eval(), torch.zeros(1, RCLIP_TOKENS, dtype=torch.long)),
    ):
        torch.onnx.export(
            tower,
            (read,),
            str(folder / RCLIP_MODEL / f"{name}.onnx"),
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            opset_version=18,
            dynamo=False,
        )
    (folder / "tokenizer").mkdir()
    vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(vocabulary, folder / "tokenizer")


def rclip(folder: Path, photos: Path, work: Path) -> int:
    """`rclip QUERY` in the photos' folder: it has no command that indexes without answering."""
    for made in (folder / "data").iterdir():
        (work / made.name).symlink_to(made)
    command = [folder / "venv" / "bin" / "rclip", "a dog on a beach"]
    called(command, cwd=photos, environment={"RCLIP_DATADIR": str(work)})
    with sqlite3.connect(work / "db.sqlite3") as catalog:
        return catalog.execute("SELECT count(*) FROM images WHERE vector IS NOT NULL").fetchone()[0]


# -- clip-retrieval ---------------------------------------------------------------------------------------------


def make_clip_retrieval_model(folder: Path) -> None:
    by_child("save_open_clip", folder / "ViT-B-32.pt")


def save_open_clip(file: Path) -> None:
    """Random weights of open_clip's ViT-B-32."""
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), file)


def clip_retrieval(folder: Path, photos: Path, work: Path) -> int:
    """`clip-retrieval inference`: vectors in .npy files. The FAISS file that its `index` command makes is left out.

    Its batch of 256 runs four times through the model before the first photo: of 32 it is quicker on a CPU.
    """
    import numpy as np

    called([
        folder / "venv" / "bin" / "clip-retrieval", "inference", f"--input_dataset={photos}", f"--output_folder={work}",
        f"--clip_model=open_clip:ViT-B-32/{folder / 'ViT-B-32.pt'}", "--batch_size=32",
        f"--num_prepro_workers={os.cpu_count()}",
    ], environment={"PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"})  # fmt: skip
    return sum(len(np.load(file, mmap_mode="r")) for file in (work / "img_emb").glob("*.npy"))


PEERS = (
    Peer("rclip", "rclip 3.3.0, ViT-B/32 at 256, ONNX Runtime", ("rclip==3.3.0",), make_rclip_model, rclip),
    Peer(
        "clip-retrieval",
        "clip-retrieval 2.45.0, open_clip ViT-B/32 at 224",
        # its package `clip` still imports pkg_resources.packaging, which later setuptools do not have
        ("clip-retrieval==2.45.0", "setuptools<70"),
        make_clip_retrieval_model,
        clip_retrieval,
    ),
)
