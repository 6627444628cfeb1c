"""Train MiniGPT-4: one matrix between a frozen BLIP-2 and a frozen Vicuna, or between ViT-g and Llama 2.

Zhu et al. 2023; Vision-CAIR/MiniGPT-4 `train_configs/`.

    photoblip train assemble --system minigpt-4 --qformer BLIP2 --language VICUNA --out START
    photoblip train minigpt4 --stage align --start START --data CAPTIONS --min-scale 0.5 --out A
    photoblip train minigpt4 --stage instruct --start A/model --data DESCRIPTIONS --min-scale 0.5 --out B

`align` is 20,000 steps of 256 captions that nothing asks for, `instruct` 400 steps of 12 on 3,500 long descriptions.
"""

from blipcore.training.instruct import Settings, train_stage
from blipcore.training.settings import as_script, run_and_print

SYSTEMS = ("minigpt-4", "minigpt-4-llama2")


def train(settings: Settings) -> dict:
    """One stage; see `train_stage`."""
    return train_stage(settings, SYSTEMS)


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
