"""Which messages are turns that can be trained: marks, cut messages, two messages of one turn."""

from __future__ import annotations

from typing import Any

from flexmask.errors import DataError

TRAIN_KEYS = (
    *("train", "training", "trainable", "weight"),
    *("loss", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask"),
)
FINISH_KEYS = ("finish_reason", "stop_reason")
_CUT = (
    *("length", "max_tokens", "max_output_tokens", "model_context_window_exceeded"),
    "content_filter",
)
_ORDER = ("reasoning_content", "content", "tool_calls")


def read_train(message: dict[str, Any], what: str) -> bool | None:
    """Return whether a message is marked as trained, None where nothing marks it.

    Raises:
        DataError: a mark is neither true nor false, or two disagree.
    """
    marks = {}
    for key in TRAIN_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise DataError(
                f"{what}: {key} must be true, false, 0 or 1, got {value!r}; a message is trained, "
                "each token alike, or is context"
            )
        marks[bool(value)] = key
    if len(marks) > 1:
        raise DataError(
            f"{what}: {marks[True]!r} says to train it, {marks[False]!r} not to; keep one of them"
        )
    return next(iter(marks), None)


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
                "which is thinking, content, tool calls, trained or not; write them as one, or put "
                "what was between them there"
            )
        said = {_ORDER[place]: message[_ORDER[place]] for place in _said(message)}
        if "tool_calls" in said:
            said["tool_calls"] = [*before.get("tool_calls", []), *said["tool_calls"]]
        joined.append({**message, **before, **said})
    return joined


def _is_continued(before: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether what `message` says comes after all that `before` says, in the order of a turn."""
    if before.get("train", True) != message.get("train", True):
        return False
    last, first = max(_said(before)), min(_said(message))
    return last < first or last == first == _ORDER.index("tool_calls")


def _said(message: dict[str, Any]) -> list[int]:
    """The parts of a turn that a message has, as places in their order."""
    values = [message.get(key) for key in _ORDER]
    return [i for i, v in enumerate(values) if v and not (isinstance(v, str) and v.isspace())]
