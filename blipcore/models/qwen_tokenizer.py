"""Qwen-VL's tokenizer from its `qwen.tiktoken`: byte-level BPE by rank, without tiktoken and without remote code.

Facts: `tokenization_qwen.py` beside the weights of Qwen/Qwen-VL. Published weights come with no tokenizer.json.
"""

import base64
from pathlib import Path

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # Qwen-7B's own

from blipcore.errors import ModelError

# they follow the last rank: <|endoftext|> is 151643, <ref> 151851, <img> 151857 and <imgpad> 151859
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)


class _QwenConverter(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return read_ranks(Path(tiktoken_url))


def load_qwen_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """`qwen.tiktoken` -> a tokenizer that `save_pretrained` writes as a tokenizer.json.

    Decode with `skip_special_tokens=False` where boxes are wanted: `<ref>` and `<box>` are special.
    Raises ModelError where the file is missing or damaged.
    """
    tokenizer = _QwenConverter(str(file), pattern=PRETOKENIZE_REGEX, extra_special_tokens=SPECIAL_TOKENS).converted()
    tokenizer.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0], pad_token=SPECIAL_TOKENS[0])


def read_ranks(file: Path) -> dict[bytes, int]:
    """A rank file, a line a token: its bytes in base64, a space, its rank; ranks count up from 0."""
    try:
        pairs = [line.split() for line in Path(file).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except FileNotFoundError as error:
        raise ModelError(f"there is no {file}: download it with Qwen-VL's weights") from error
    except ValueError as error:
        raise ModelError(f"{file} is no rank file of tiktoken's ({error}): download it again") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ModelError(f"{file} is not whole: download it again")
    return ranks
