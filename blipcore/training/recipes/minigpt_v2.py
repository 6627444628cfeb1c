"""Train MiniGPT-v2: a matrix over four joined tokens, and adapters on the language model's queries and values.

Chen et al. 2023; Vision-CAIR/MiniGPT-4 `train_configs/minigptv2_finetune.yaml`. ViT-g at 448 px stays frozen.

    photoblip train assemble --system minigpt-v2 --vision VIT --language LLAMA2 --out START
    photoblip train minigpt_v2 --stage pretrain --start START --data CAPTIONS --out A
    photoblip train minigpt_v2 --stage multitask --start A/model --instructions FILE.jsonl --out B
    photoblip train minigpt_v2 --stage instruct --start B/model --instructions FILE.jsonl --out C

400,000, 50,000 and 35,000 steps. Instructions open with their task: [vqa], [caption], [grounding], [refer],
[detection] or [identify]; boxes are text, {<x1><y1><x2><y2>} in 0 to 100. A stage's adapters are merged into the model
it writes, and the next stage has new ones; the authors go on with the old.
"""

from blipcore.training.instruct import Settings, train_stage
from blipcore.training.settings import as_script, run_and_print

SYSTEMS = ("minigpt-v2",)


def train(settings: Settings) -> dict:
    """One stage; see `train_stage`."""
    return train_stage(settings, SYSTEMS)


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
