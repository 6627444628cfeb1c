"""What each system's prompts look like, byte for byte, written out from what their authors published."""

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from blipcore.models.systems import SYSTEMS
from blipcore.models.templates import CUT, TEMPLATES, Turn, single

ONE = single("What is this?", "A ball.")
TWO: list[Turn] = [*ONE, *single("Which colour?", "Red.")]

# LLaVA, conversation.py: conv_llava_v1, conv_vicuna_v1
LLAVA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. "
)
LLAVA_15 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
# MiniGPT-4, conversation.py: CONV_VISION_Vicuna0 and CONV_VISION_LLama2
MINIGPT4 = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
# Qwen-VL, qwen_generation_utils.py: make_context
QWEN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"

# one exchange; what two turns look like. {…} is what the model learns to write; <image> is the image's place.
EXPECTED = {
    # LLaVA's preprocess_plain: the caption and the separator; MiniGPT-4's first stage: end_sym "\n"
    "plain": ("<s><image>What is this?{A ball.\n}", "<s><image>What is this?{A ball.\n}Which colour?{Red.\n}"),
    # LAVIS blip2_opt.py: the text and "\n" after OPT's first token
    "blip2-opt": (
        "<image></s>What is this?{ A ball.\n}",
        "<image></s>What is this?{ A ball.\n}Which colour?{ Red.\n}",
    ),
    # LAVIS examples/blip2_instructed_generation.ipynb: "Question: {} Answer: {}." joined by spaces
    "blip2-opt-chat": (
        "<image></s>Question: What is this? Answer:{ A ball.\n}",
        "<image></s>Question: What is this? Answer:{ A ball.}. Question: Which colour? Answer:{ Red.\n}",
    ),
    # LAVIS blip2_t5.py: prompt and answer are two texts there
    "blip2-t5": ("<image>What is this?{ A ball.}", "<image>What is this?{ A ball.} Which colour?{ Red.}"),
    "blip2-t5-chat": (
        "<image>Question: What is this? Answer:{ A ball.}",
        "<image>Question: What is this? Answer:{ A ball.}. Question: Which colour? Answer:{ Red.}",
    ),
    # LAVIS blip2_vicuna_instruct.py: bos_token is "</s>" there
    "instructblip-vicuna": (
        "<image></s>What is this?{ A ball.</s>}",
        "<image></s>What is this?{ A ball.</s>}Which colour?{ Red.</s>}",
    ),
    "llava": (
        "<s>" + LLAVA + "USER: <image>\nWhat is this? ASSISTANT:{ A ball.</s>}",
        "<s>"
        + LLAVA
        + "USER: <image>\nWhat is this? ASSISTANT:{ A ball.</s>}USER: Which colour? ASSISTANT:{ Red.</s>}",
    ),
    "llava-1.5": (
        "<s>" + LLAVA_15 + "USER: <image>\nWhat is this? ASSISTANT:{ A ball.</s>}",
        "<s>"
        + LLAVA_15
        + "USER: <image>\nWhat is this? ASSISTANT:{ A ball.</s>}USER: Which colour? ASSISTANT:{ Red.</s>}",
    ),
    "minigpt4": (
        "<s>" + MINIGPT4 + "###Human: <Img><image></Img> What is this?###Assistant: {A ball.###}",
        "<s>"
        + MINIGPT4
        + "###Human: <Img><image></Img> What is this?###Assistant: {A ball.###}"
        + "Human: Which colour?###Assistant: {Red.###}",
    ),
    # train_configs/minigpt4_stage2_finetune.yaml: prompt_template '###Human: {} ###Assistant: ', end_sym "###"
    "minigpt4-training": (
        "<s>###Human: <Img><image></Img> What is this? ###Assistant: {A ball.###}",
        "<s>###Human: <Img><image></Img> What is this? ###Assistant: {A ball.###}"
        "Human: Which colour? ###Assistant: {Red.###}",
    ),
    # minigpt_base.py, tokenize_conversation: every answer with end_sym, every later question with the first token
    "minigpt4-llama2": (
        "<s>" + MINIGPT4 + "<s>[INST] <Img><image></Img> What is this? [/INST] {A ball.</s>}",
        "<s>"
        + MINIGPT4
        + "<s>[INST] <Img><image></Img> What is this? [/INST] {A ball.</s>}<s>[INST] Which colour? [/INST] {Red.</s>}",
    ),
    # train_configs/minigpt4_llama2_stage2_finetune.yaml: prompt_template '[INST] {} [/INST] ', end_sym "</s>"
    "minigpt4-llama2-training": (
        "<s>[INST] <Img><image></Img> What is this? [/INST] {A ball.</s>}",
        "<s>[INST] <Img><image></Img> What is this? [/INST] {A ball.</s>}<s>[INST] Which colour? [/INST] {Red.</s>}",
    ),
    # CONV_VISION_minigptv2; minigpt_v2.py: prompt_template '[INST] {} [/INST]'
    "minigpt-v2": (
        "<s>[INST] <Img><image></Img> What is this? [/INST]{ A ball.</s>}",
        "<s>[INST] <Img><image></Img> What is this? [/INST]{ A ball.</s>}<s>[INST] Which colour? [/INST]{ Red.</s>}",
    ),
    # the paper's appendix: "<img>…</img>Generate the caption in English: the beautiful flowers for design.<eos>"
    "qwen-vl": (
        "<img><image></img>What is this?{ A ball.<|endoftext|>}",
        "<img><image></img>What is this?{ A ball.<|endoftext|>}Which colour?{ Red.<|endoftext|>}",
    ),
    # eval_mm/evaluate_vqa.py: '<img>{}</img>{} Answer:'
    "qwen-vl-vqa": (
        "<img><image></img>What is this? Answer:{ A ball.<|endoftext|>}",
        "<img><image></img>What is this? Answer:{ A ball.<|endoftext|>}Which colour? Answer:{ Red.<|endoftext|>}",
    ),
    # make_context, and the tokenizer's from_list_format: "Picture 1: <img>…</img>\n"
    "qwen-vl-chat": (
        QWEN + "\n<|im_start|>user\nPicture 1: <img><image></img>\nWhat is this?<|im_end|>"
        "\n<|im_start|>assistant\n{A ball.<|im_end|>}",
        QWEN + "\n<|im_start|>user\nPicture 1: <img><image></img>\nWhat is this?<|im_end|>"
        "\n<|im_start|>assistant\n{A ball.<|im_end|>}\n<|im_start|>user\nWhich colour?<|im_end|>"
        "\n<|im_start|>assistant\n{Red.<|im_end|>}",
    ),
    # ours: Qwen2-VL's pretraining format is not published
    "qwen2-vl": (
        "<|vision_start|><image><|vision_end|>What is this?{ A ball.<|endoftext|>}",
        "<|vision_start|><image><|vision_end|>What is this?{ A ball.<|endoftext|>}Which colour?{ Red.<|endoftext|>}",
    ),
    # Qwen2-VL's chat_template
    "qwen2-vl-chat": (
        QWEN + "\n<|im_start|>user\n<|vision_start|><image><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n{A ball.<|im_end|>\n}",
        QWEN + "\n<|im_start|>user\n<|vision_start|><image><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n{A ball.<|im_end|>\n}<|im_start|>user\nWhich colour?<|im_end|>\n"
        "<|im_start|>assistant\n{Red.<|im_end|>\n}",
    ),
}


def written(name: str, turns: list[Turn], images: int = 1) -> str:
    """A conversation as one text, as EXPECTED has them."""
    template = TEMPLATES[name]
    shown = ["<s>" if template.bos else ""]
    for segment in template.render(turns, images):
        shown.append("<image>" if segment.image else f"{{{segment.text}}}" if segment.learnt else segment.text)
    return "".join(shown).replace(CUT, "")


def test_every_template_is_written_out_here():
    assert EXPECTED.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_one_exchange_is_as_published(name):
    assert written(name, ONE) == EXPECTED[name][0]


@pytest.mark.parametrize("name", EXPECTED)
def test_two_turns_are_as_published(name):
    assert written(name, TWO) == EXPECTED[name][1]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_prompt_is_what_stands_before_the_answer(name):
    """What is asked at the end of a conversation is what the answer followed in training."""
    for turns, expected in ((ONE, EXPECTED[name][0]), (TWO, EXPECTED[name][1])):
        assert written(name, turns[:-1]) == expected[: expected.rindex("{")]


@pytest.mark.parametrize("name", EXPECTED)
def test_without_a_picture_no_marks_of_one_are_left(name):
    text = written(name, ONE, images=0)
    assert "<image>" not in text
    assert not any(mark and mark in text.replace(MINIGPT4, "") for mark in TEMPLATES[name].image)


def test_several_pictures_are_numbered():
    assert "Picture 1: <img><image></img>\nPicture 2: <img><image></img>\nWhat" in written(
        "qwen-vl-chat", ONE, images=2
    )
    twice = "<|vision_start|><image><|vision_end|>" * 2
    assert f"user\n{twice}What" in written("qwen2-vl-chat", ONE, images=2)


# Qwen/Qwen2-VL-7B-Instruct, tokenizer_config.json, without its lines for videos
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("turns", [ONE[:1], ONE, TWO[:3], TWO], ids=len)
def test_qwen2_vls_own_chat_template_writes_the_same(turns):
    # as transformers renders chat templates
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    first = [{"type": "image"}, {"type": "text", "text": turns[0]["content"]}]
    messages = [{"role": "user", "content": first}, *turns[1:]]
    expected = template.render(messages=messages, add_generation_prompt=turns[-1]["role"] == "user")
    ours = written("qwen2-vl-chat", turns).replace("<image>", "<|image_pad|>")
    assert ours.replace("{", "").replace("}", "") == expected


@pytest.mark.parametrize(
    "turns",
    [[], ONE[1:], [ONE[0], ONE[0]], [*TWO, TWO[1]]],
    ids=["none", "answer first", "two questions", "two answers"],
)
def test_turns_alternate_beginning_with_the_user(turns):
    with pytest.raises(ValueError, match="take turns"):
        TEMPLATES["llava"].render(turns)


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=lambda system: system.name)
def test_every_system_and_stage_names_a_template(system):
    assert {system.template, system.chat} | {stage.template or system.template for stage in system.stages} <= {
        *TEMPLATES
    }
