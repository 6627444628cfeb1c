"""Train Qwen-VL: a vision tower that learns with its resampler, then with everything, then Qwen-VL-Chat.

Bai et al. 2023, section 3 and appendix; the authors have published no code of the first two stages.

    photoblip train assemble --system qwen-vl --vision VIT --language QWEN --out START
    photoblip train qwen_vl --stage pretrain --start START --data CAPTIONS --out A
    photoblip train qwen_vl --stage multitask --start A/model --instructions FILE.jsonl --out B
    photoblip train qwen_vl --stage instruct --start B/model --instructions FILE.jsonl --out C

224 px in the first stage, 448 from the second on; 50,000, 19,000 and 8,000 steps. Boxes are text:
<ref>a cat</ref><box>(x1,y1),(x2,y2)</box> in 0 to 999.
"""

from blipcore.training.instruct import Settings, train_stage
from blipcore.training.settings import as_script, run_and_print

SYSTEMS = ("qwen-vl",)


def train(settings: Settings) -> dict:
    """One stage; see `train_stage`."""
    return train_stage(settings, SYSTEMS)


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
