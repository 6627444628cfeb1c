"""Train Qwen2-VL: the vision tower, then everything, then the language model.

Wang et al. 2024, section 2.2; the report gives no rates. Pictures keep their shape, and more of it takes more tokens.

    photoblip train qwen2_vl --stage instruct --start qwen2-vl-2b --instructions FILE.jsonl --out DIR
    photoblip train qwen2_vl --stage pretrain --start FOLDER --data CAPTIONS --out A
    photoblip train qwen2_vl --stage multitask --start A/model --instructions FILE.jsonl --out B
"""

from blipcore.training.instruct import Settings, train_stage
from blipcore.training.settings import as_script, run_and_print

SYSTEMS = ("qwen2-vl",)


def train(settings: Settings) -> dict:
    """One stage; see `train_stage`."""
    return train_stage(settings, SYSTEMS)


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
