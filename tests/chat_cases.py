"""Conversations with and without a system message, thinking and tools, and their oracle."""

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from flexmask.tree.sample import Sample

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "The first."},
                "b": {"type": "integer", "description": "The second."},
            },
            "required": ["a", "b"],
        },
    },
}
# What ends generation, from the models' own generation settings.
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<\uff5cend\u2581of\u2581sentence\uff5c>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"],
    "glm": [],  # the next turn's role does, as in NEXT_ROLES
    "gptoss": ["<|return|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "llava_next": ["</s>"],
    "smolvlm": ["<end_of_utterance>"],
    "kimi_k2": ["<|im_end|>"],
    "kimi_k3": ["<|end_of_msg|>"],
    "minimax": ["[e~["],
    "llama3": ["<|eot_id|>"],
    "muse": ["<|eot|>"],
    "phi3": ["<|end|>"],
    "lfm2": ["<|im_end|>"],
    "nemotron": ["<|im_end|>"],
    "qwen": ["<|im_end|>"],
}
IN_PARTS = ("idefics3", "llava_next", "smolvlm")  # these write content from a list of parts
NEXT_ROLES = {"answer": "<|user|>", "call": "<|observation|>"}  # of GLM
CASES = [
    "+".join(parts) or "plain"
    for parts in (
        [name for name, used in zip(("system", "thinking", "tools"), flags, strict=True) if used]
        for flags in product((False, True), repeat=3)
    )
]


def chat_case(case: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages of two questions, and tools; `case` names the features, as in "system+tools"."""
    features = case.split("+")

    def assistant(content: str, thinking: str, **more: Any) -> dict[str, Any]:
        thought = {"reasoning_content": thinking} if "thinking" in features else {}
        return {"role": "assistant", "content": content, **thought, **more}

    messages = [{"role": "user", "content": "What is 2 plus 2?"}]
    if "system" in features:
        messages.insert(0, {"role": "system", "content": "You teach sums."})
    if "tools" in features:
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
        messages.append(assistant("", "I should call it.", tool_calls=[call]))
        messages.append({"role": "tool", "name": "add", "content": "four"})
    messages.append(assistant("It is 4.", "Two and two."))
    messages.append({"role": "user", "content": "And plus 1?"})
    messages.append(assistant("That makes 5.", "One more\nthan four."))
    return messages, [TOOL] if "tools" in features else None


def hand_rendered(
    tokenizer: Any, messages: list[dict[str, Any]], index: int, tools: Any, **settings: Any
) -> tuple[str, str]:
    """The prompt before message `index`, and the text up to that message, straight from Jinja."""
    common = {"tools": tools, "tokenize": False, **settings}
    messages = [  # with gpt-oss's name for the thinking, which older transformers do not fill in
        message | {"thinking": message["reasoning_content"]}
        if "reasoning_content" in message
        else message
        for message in messages
    ]
    prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, **common)
    return prompt, tokenizer.apply_chat_template(messages[: index + 1], **common)


def until_stop(name: str, text: str, message: dict[str, Any]) -> str:
    """What the template `name` writes for a message, up to what ends generation."""
    if name.startswith("glm"):
        return text + NEXT_ROLES["call" if "tool_calls" in message else "answer"]
    stops = next(stops for start, stops in STOPS.items() if name.startswith(start))
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def assert_equal_to_hand(
    samples: Sequence[Sample],
    tokenizer: Any,
    name: str,
    case: str,
    settings: dict[str, Any],
    *,
    composed: bool,
) -> None:
    """Hold the samples of a case with the template `name` to each turn rendered by hand."""
    messages, tools = chat_case(case)
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    given = parts if name in IN_PARTS else messages
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert [sample.key for sample in samples] == answers
    for sample in samples:
        message = messages[sample.key]
        prompt, full = hand_rendered(tokenizer, given, sample.key, tools, **settings)
        trained = sample.loss_weights > 0
        context, completion = sample.input_ids[~trained], sample.input_ids[trained]
        assert (trained == sorted(trained)).all()
        assert context.tolist() == tokenizer.encode(prompt, add_special_tokens=False)
        written = tokenizer.decode(completion)
        if full.startswith(prompt):
            rest = until_stop(name, full[len(prompt) :], message)
            if message.get("reasoning_content", "") not in rest:  # the template leaves it empty
                assert written.replace(message["reasoning_content"], "", 1) == rest
                assert composed
            else:
                assert completion.tolist() == tokenizer.encode(rest, add_special_tokens=False)
                assert tokenizer.decode(sample.input_ids) == prompt + rest
        else:
            assert composed or name == "gptoss"
            answer = re.split(r"</(?:mm:)?think>\s*|<channel\|>", written)[-1]
            ended = until_stop(name, full, message) if name.startswith("glm") else full.rstrip()
            assert ended.endswith(answer)
        thinking = written.index(message.get("reasoning_content", ""))
        assert message["content"] in written[thinking:]
        assert ("add" in written) == ("tool_calls" in message)
