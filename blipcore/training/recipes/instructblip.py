"""Train InstructBLIP: a Q-Former that reads the instruction with the image.

Dai et al. 2023; salesforce/LAVIS `models/blip2_models/blip2_vicuna_instruct.py`. ViT and language model stay frozen.

    photoblip train assemble --system instructblip-vicuna --qformer STAGE1/model --language VICUNA --out START
    photoblip train instructblip --stage generative --start START --data CAPTIONS --min-scale 0.5 --out A
    photoblip train instructblip --stage instruct --start A/model --instructions FILE.jsonl --min-scale 0.5 --out B

The first stage of all is BLIP-2's, `pretrain_blip2`; `generative` is BLIP-2's second. The paper's `instruct` draws from
13 data sets, each as often as the square root of its size, for 60,000 steps.
"""

from blipcore.training.instruct import Settings, train_stage
from blipcore.training.settings import as_script, run_and_print

SYSTEMS = ("instructblip-vicuna", "instructblip-t5")


def train(settings: Settings) -> dict:
    """One stage; see `train_stage`."""
    return train_stage(settings, SYSTEMS)


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
