"""Train LLaVA or LLaVA-1.5: a frozen CLIP, a projector, and a language model that follows instructions.

Liu et al. 2023, "Visual Instruction Tuning" and "Improved Baselines with Visual Instruction Tuning";
haotian-liu/LLaVA `scripts/`.

    photoblip train assemble --system llava-1.5 --vision CLIP --language VICUNA --out START
    photoblip train llava --stage align --start START --data CAPTIONS --out A
    photoblip train llava --stage instruct --start A/model --instructions FILE.jsonl --out B

`align` trains the projector on 558,000 captions (595,000 for LLaVA), `instruct` projector and language model on 665,000
conversations (158,000, three epochs). The published files are lists: `jq -c '.[] | select(.image)'` makes lines.
"""

from blipcore.training.instruct import Settings, train_stage
from blipcore.training.settings import as_script, run_and_print

SYSTEMS = ("llava", "llava-1.5")


def train(settings: Settings) -> dict:
    """One stage; see `train_stage`."""
    return train_stage(settings, SYSTEMS)


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
