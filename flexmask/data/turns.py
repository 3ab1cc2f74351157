"""Which messages are turns that can be trained: marks, cut messages, two messages of one turn."""

from __future__ import annotations

from typing import Any

from flexmask.errors import DataError
from flexmask.tree.sample import LARGEST_WEIGHT, SMALLEST_WEIGHT

TRAIN_KEYS = (
    *("train", "training", "trainable", "weight"),
    *("loss", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask"),
)
_WEIGHT_KEYS = ("weight", "loss_weight", "loss_scale")
FINISH_KEYS = ("finish_reason", "stop_reason")
_CUT = (
    *("length", "max_tokens", "max_output_tokens", "model_context_window_exceeded"),
    "content_filter",
)
_ORDER = ("reasoning_content", "content", "tool_calls")


def read_weight(message: dict[str, Any], what: str) -> float | None:
    """Return what a token of a message counts in the loss, 0 for context, None if nothing says so.

    Raises:
        DataError: a mark is neither true nor false nor a weight, or two disagree.
    """
    marks: dict[bool, str] = {}
    weights: dict[float, str] = {}
    for key in TRAIN_KEYS:
        value = message.get(key)
        if value is None:
            continue
        is_weight = key in _WEIGHT_KEYS and type(value) in (int, float)
        if value not in (0, 1) and not (is_weight and SMALLEST_WEIGHT <= value <= LARGEST_WEIGHT):
            numbers = f"0 or {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
            raise DataError(
                f"{what}: {key} must be true, false, {numbers if key in _WEIGHT_KEYS else '0 or 1'}"
                f", got {value!r}; a message is trained, each token alike, or is context"
            )
        marks[bool(value)] = key
        if is_weight:
            weights[float(value)] = key
    if len(marks) > 1:
        raise DataError(
            f"{what}: {marks[True]!r} says to train it, {marks[False]!r} not to; keep one of them"
        )
    if len(weights) > 1:
        named = " and ".join(f"{key} {weight:g}" for weight, key in weights.items())
        raise DataError(f"{what} has {named}; keep one of them")
    return next(iter(weights), next(map(float, marks), None))


def check_finished(message: dict[str, Any], what: str) -> None:
    """Raise DataError for a message to be trained that the model did not end itself."""
    for key in FINISH_KEYS:
        reason = message.get(key)
        if isinstance(reason, str) and reason.lower() in _CUT:
            raise DataError(
                f"{what} was cut ({key} {reason!r}), so no stop token belongs behind it; give it "
                '"train": false to keep it as context, or leave the conversation out'
            )


def join_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with each run of the assistant's joined into the one turn that it is.

    A turn is thinking, then content, then tool calls. Keys that both messages have are the first's.

    Raises:
        DataError: two messages in a row are no one turn.
    """
    joined: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if not joined or {joined[-1]["role"], message["role"]} != {"assistant"}:
            joined.append(message)
            continue
        before = joined.pop()
        if not _is_continued(before, message):
            raise DataError(
                f"messages {index - 1} and {index} are both from the assistant and no one turn, "
                "which is thinking, content, tool calls of one weight; write them as one, or put "
                "what was between them there"
            )
        said = {_ORDER[place]: message[_ORDER[place]] for place in _said(message)}
        if "tool_calls" in said:
            said["tool_calls"] = [*before.get("tool_calls", []), *said["tool_calls"]]
        joined.append({**message, **before, **said})
    return joined


def _is_continued(before: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether what `message` says comes after all that `before` says, in the order of a turn."""
    if any(before.get(key, 1) != message.get(key, 1) for key in ("train", "weight")):
        return False
    last, first = max(_said(before)), min(_said(message))
    return last < first or last == first == _ORDER.index("tool_calls")


def _said(message: dict[str, Any]) -> list[int]:
    """The parts of a turn that a message has, as places in their order."""
    values = [message.get(key) for key in _ORDER]
    return [i for i, v in enumerate(values) if v and not (isinstance(v, str) and v.isspace())]
