"""Conversations with and without a system message, thinking and tools, and their oracle."""

from itertools import product
from typing import Any

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
