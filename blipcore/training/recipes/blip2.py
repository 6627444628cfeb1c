"""Train BLIP-2's second stage, a Q-Former that speaks to a frozen OPT or FlanT5, and fine-tune it for captions.

Li et al. 2023, sections 3.3 and 4; salesforce/LAVIS `projects/blip2/train/`. The first stage is `pretrain_blip2`.

    photoblip train assemble --system blip2-opt --qformer STAGE1/model --language OPT --out START
    photoblip train blip2 --stage generative --start START --data CAPTIONS --min-scale 0.5 --out A
    photoblip train blip2 --stage caption-finetune --start A/model --data COCO --epochs 5 --precision fp32 --out B

`generative` trains Q-Former, queries, ln_vision and the matrix: 80,000 steps of 1,920 (OPT) or 1,520 (FlanT5) photos.
With FlanT5 the encoder reads a caption's first words and the decoder learns the rest. `caption-finetune` trains the
vision tower too, at 364 px, each block at 0.95 of the next one's rate.
"""

from blipcore.training.instruct import Settings, train_stage
from blipcore.training.settings import as_script, run_and_print

SYSTEMS = ("blip2-opt", "blip2-t5")


def train(settings: Settings) -> dict:
    """One stage; see `train_stage`."""
    return train_stage(settings, SYSTEMS)


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
