"""Words to token ids and labels: what the model reads, and which of it it learns to say.

A conversation is rendered as stretches of text, each known to be either read or learned. Tokens take their label from
the stretch that their characters lie in, so no tokenizer can put a label in the wrong place. Text is tokenized piece
by piece around images, as LLaVA does: each piece stands for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_genhancer.errors import InputError

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
IMAGE = "<image>"  # an image's place in a question

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


class Turn(NamedTuple):
    """A question, with one :data:`IMAGE` per image, and its answer; None where the model is to give it."""

    question: str
    answer: str | None


class Encoded(NamedTuple):
    """Token ids with one IMAGE_TOKEN_INDEX per image, and as many labels, IGNORE_INDEX where nothing is learned."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written. ``{bos}`` and ``{eos}`` stand for the tokenizer's own tokens.

    The token that opens every sequence is the tokenizer's business and no part of a template.

    Attributes:
        first, later: what precedes the first and each later question. ask: what follows a question; a prompt ends here.
        lead: what precedes an answer and is learned with it. stop: what ends it, learned too.
        markers: tokens that the tokenizer must know.
        questions: False leaves only the questions' images.
    """

    first: str = ""
    later: str = ""
    ask: str = ""
    lead: str = ""
    stop: str = "{eos}"
    markers: tuple[str, ...] = ()
    questions: bool = True


def _llama_2(system: str) -> Template:
    return Template(
        first=f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n", later="{bos}[INST] ", ask=" [/INST]", lead=" ", stop=" {eos}"
    )


_CHATML = Template(
    first="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    later="\n<|im_start|>user\n",
    ask="<|im_end|>\n<|im_start|>assistant\n",
    stop="<|im_end|>",
    markers=("<|im_start|>", "<|im_end|>"),
)

# The names are the original code's where it has the template (``llama_2``, ``llava_llama_2``, ``mistral_instruct``).
TEMPLATES: dict[str, Template] = {
    "plain": Template(stop="\n", questions=False),
    "v1": Template(first=f"{VICUNA_SYSTEM} USER: ", later="USER: ", ask=" ASSISTANT:", lead=" "),
    "llama_2": _llama_2(LLAMA_2_SYSTEM),
    "llava_llama_2": _llama_2(LLAVA_SYSTEM),
    "llama_3": Template(
        first=f"<|start_header_id|>system<|end_header_id|>\n\n{LLAVA_SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        later="<|start_header_id|>user<|end_header_id|>\n\n",
        ask="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        stop="<|eot_id|>",
        markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "chatml": _CHATML,
    "qwen": _CHATML,
    "mistral": Template(first="[INST] ", later="[INST] ", ask=" [/INST]", lead=" ", stop=" {eos}"),
}


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
        InputError: there is none.
    """
    if name not in TEMPLATES:
        raise InputError(f"no conversation template {name!r}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def check_template(name: str, tokenizer: Any) -> None:
    """Whether a tokenizer can write a template.

    Raises:
        InputError: a marker of the template is not one token of this tokenizer, or it has no token for an end.
    """
    template = get_template(name)
    for marker in template.markers:
        if len(tokenizer.encode(marker, add_special_tokens=False)) != 1:
            raise InputError(
                f"the language model's tokenizer has no token {marker}, which template {name!r} is made of: "
                "choose the template that the language model was trained with"
            )
    if "{eos}" in template.stop and tokenizer.eos_token is None:
        raise InputError(f"the language model's tokenizer has no end token, which template {name!r} needs")


def stop_token_ids(name: str, tokenizer: Any) -> list[int]:
    """The tokens at which an answer ends: the template's own, and the tokenizer's end token."""
    template = get_template(name)
    ids = [] if not template.markers else tokenizer.encode(template.stop, add_special_tokens=False)
    return [*ids, *(i for i in [tokenizer.eos_token_id] if i is not None and i not in ids)]


def render(turns: Sequence[Turn], template: str, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Stretches of text, each with whether it is learned; together they are what the model is shown."""
    form = get_template(template)

    def fill(text: str) -> str:
        return text.replace("{bos}", tokenizer.bos_token or "").replace("{eos}", tokenizer.eos_token or "")

    for number, (question, answer) in enumerate(turns):
        if not form.questions:
            question = IMAGE * question.count(IMAGE)
        yield fill(form.later if number else form.first) + question + fill(form.ask), False
        if answer is not None:
            yield form.lead + answer + fill(form.stop), True


def encode(turns: Sequence[Turn], template: str, tokenizer: Any, *, images: bool = True) -> Encoded:
    """A conversation as ids and labels.

    Args:
        template: a name in :data:`TEMPLATES`.
        tokenizer: a fast tokenizer, see :func:`llava_genhancer.llava.tokenizer.load_tokenizer`.
        images: False reads :data:`IMAGE` as the ordinary text that it is in a conversation without images.
    """
    texts, learned = [""], [[]]  # type: tuple[list[str], list[list[tuple[int, int]]]]
    for text, learn in render(turns, template, tokenizer):
        for number, piece in enumerate(text.split(IMAGE) if images else [text]):
            if number:
                texts.append("")
                learned.append([])
            if learn:
                learned[-1].append((len(texts[-1]), len(texts[-1]) + len(piece)))
            texts[-1] += piece
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    start = opening_ids(tokenizer)
    result = Encoded(start, [IGNORE_INDEX] * len(start))
    for number, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        if number:
            result.input_ids.append(IMAGE_TOKEN_INDEX)
            result.labels.append(IGNORE_INDEX)
        result.input_ids.extend(ids)
        result.labels.extend(_labels(ids, offsets, learned[number]))
    return result


def _labels(ids: list[int], offsets: list[tuple[int, int]], learned: list[tuple[int, int]]) -> list[int]:
    """A token is learned if any of its characters is, or, having none, if it stands where something learned starts."""
    labels = []
    spans = iter([*learned, (2**62, 2**62)])
    begin, end = next(spans)
    for token, (first, last) in zip(ids, offsets, strict=True):
        while first >= end:
            begin, end = next(spans)
        labels.append(token if last > begin or first >= begin else IGNORE_INDEX)
    return labels


def opening_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every sequence: the begin token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[0] == bos else []


def encode_prompt(turns: Sequence[Turn], template: str, tokenizer: Any, *, images: bool = True) -> list[int]:
    """Token ids up to where the assistant begins; the last turn's answer is None."""
    assert turns[-1].answer is None
    return encode(turns, template, tokenizer, images=images).input_ids


def chat_template(template: str) -> str:
    """The template of that name in Jinja, for a HF processor.

    Messages alternate between ``user`` and ``assistant``; a content is text, or a list of ``{"type": "image"}`` and
    ``{"type": "text", "text": ...}``, where an image becomes ``<image>`` and a line break.
    """

    def quoted(text: str) -> str:
        text = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        return ("'" + text + "'").replace("{bos}", "' + bos_token + '").replace("{eos}", "' + eos_token + '")

    form = get_template(template)
    show_text = "{{ item['text'] }}" if form.questions else ""
    show = "{{ message['content'] }}" if form.questions else ""
    line = "<image>\\n" if form.questions else "<image>"
    return "".join(
        [
            "{% for message in messages %}",
            "{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}",
            "{{ raise_exception('roles must be user, assistant, user, ...; the system prompt is built in') }}",
            "{% endif %}",
            "{% if message['role'] == 'user' %}",
            f"{{{{ {quoted(form.first)} if loop.first else {quoted(form.later)} }}}}",
            f"{{% if message['content'] is string %}}{show}{{% else %}}",
            "{% for item in message['content'] %}",
            f"{{% if item['type'] == 'image' %}}{{{{ '{line}' }}}}{{% else %}}{show_text}{{% endif %}}",
            "{% endfor %}{% endif %}",
            f"{{% if not loop.last or add_generation_prompt %}}{{{{ {quoted(form.ask)} }}}}{{% endif %}}",
            "{% else %}",
            f"{{{{ {quoted(form.lead)} }}}}",
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}",
            "{% for item in message['content'] %}{{ item['text'] }}{% endfor %}{% endif %}",
            f"{{{{ {quoted(form.stop)} }}}}",
            "{% endif %}{% endfor %}",
        ]
    )
