"""What each token of a conversation is: context, thinking, response or tool.

For people and pictures only; nothing that is trained depends on it. The chat template is the oracle
here too. A field of a message stands where the rendered text changes when a mark takes the field's
place. What cannot be found in this way is called context, or response where it is trained.

    context     system and user messages, headers, generation prompts
    thinking    what is written before the answer of a message that thinks, closing tag included
    response    the answer, stop token included
    tool        tool calls and what tools send back, headers between them included
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flexmask.data.messages import Conversation
from flexmask.data.renderer import Renderer
from flexmask.data.template import ChatTemplate, Message
from flexmask.data.thoughts import closes_thought
from flexmask.errors import TemplateError
from flexmask.tools.show.orders import token_index
from flexmask.tree.sample import common_prefix_length
from flexmask.tree.tree import PrefixTree, Segment

KINDS = ("context", "thinking", "response", "tool")

_CONTEXT, _THINKING, _RESPONSE, _TOOL = range(len(KINDS))
_UNKNOWN = -1
_MARK = "\ue000"  # of the private use area, so that no real text holds it
_FIELDS = {"reasoning_content": _THINKING, "content": _RESPONSE}

Render = Callable[[Message], str]


def label_tree(tree: PrefixTree, conversation: Conversation, renderer: Renderer) -> PrefixTree:
    """The same tree with segments cut where the kind of token changes, each with its `kind`.

    Tokens, weights and packed order are those of `tree`.

    Args:
        tree: `renderer.tree(conversation)`.
        conversation: what it was made from.
        renderer: what made it.
    """
    template = renderer.template(conversation)
    codes = np.full(tree.num_tokens, _UNKNOWN, np.int8)
    turns = [_read_turn(template, conversation.messages, i) for i in conversation.trained]
    places = [token_index(tree, tree.path(leaf.segment)) for leaf in tree.leaves]
    sizes = [0 if leaf.weights is None else leaf.weights.size for leaf in tree.leaves]
    starts = [place.size - size for place, size in zip(places, sizes, strict=True)]
    for turn, place, start in zip(turns, places, starts, strict=True):
        _paint(codes, place[start:], turn.codes[start - place.size :])
    stops = tuple({turn.stop for turn in turns} - {""})
    # The last context holds the whole history; earlier ones seldom have anything to add.
    for turn, place, start in zip(turns[::-1], places[::-1], starts[::-1], strict=True):
        context = place[:start]
        if (codes[context] == _UNKNOWN).any():
            _paint(codes, context, _context_codes(template, turn, context.size, stops))
    return _cut(tree, np.where(codes == _UNKNOWN, _CONTEXT, codes))


class _Turn(NamedTuple):
    """One sample's texts, its stop token or "", and the kinds of its tokens, int8."""

    history: list[Message]
    prompt: str
    stop: str
    codes: np.ndarray


def _read_turn(template: ChatTemplate, messages: list[Message], index: int) -> _Turn:
    history, message = messages[:index], messages[index]
    prompt = template.prompt(history)
    written = template.completion(prompt, history, message)

    def render(changed: Message) -> str:
        return template.completion(prompt, history, changed)

    codes = np.full(len(written), _RESPONSE, np.int8)
    fields = sorted(_find_fields(render, message, written))
    answers = [field for field in fields if field.code != _THINKING]
    start = answers[0].start if answers else 0
    if not message["content"].strip() and "tool_calls" not in message:
        start = len(written)  # nothing but a thought
    if "reasoning_content" in message or closes_thought(written[:start]):
        codes[:start] = _THINKING
    elif answers:
        codes[:start] = answers[0].code
    for field in answers:
        codes[field.start :] = field.code
    codes = np.concatenate((np.full(len(prompt), _CONTEXT, np.int8), codes))
    tokens = _token_codes(template.tokenizer, prompt + written, codes)
    return _Turn(history, prompt, template.stop_token(written) or "", tokens)


class _Field(NamedTuple):
    """Where a field of a message stands in a rendered text: characters [start, stop)."""

    start: int
    stop: int
    code: int


def _context_codes(
    template: ChatTemplate, turn: _Turn, num_tokens: int, stops: tuple[str, ...]
) -> np.ndarray:
    """The kinds of the tokens of a sample's context, int8 [num_tokens]."""
    prompt, history = turn.prompt, turn.history
    codes = np.full(len(prompt), _CONTEXT, np.int8)
    end_of_tools: int | None = None  # where the latest call or result ends, while none but follow
    for index, message in enumerate(history):

        def render(changed: Message, index: int = index) -> str:
            return template.prompt([*history[:index], changed, *history[index + 1 :]])

        if message["role"] == "tool":
            for field in _find_fields(render, message, prompt):
                codes[field.start if end_of_tools is None else end_of_tools : field.stop] = _TOOL
                end_of_tools = field.stop
            continue
        end_of_tools = None
        if message["role"] != "assistant":
            continue
        found = sorted(_find_fields(render, message, prompt))
        for number, field in enumerate(found, start=1):
            is_last = number == len(found)
            own = (len(stop) for stop in stops if prompt.startswith(stop, field.stop))
            stop = field.stop + max(own, default=0) if is_last else found[number].start
            codes[field.start : stop] = field.code
            end_of_tools = stop if field.code == _TOOL else None
    tokens = _token_codes(template.tokenizer, prompt, codes)
    return tokens if tokens.size == num_tokens else np.full(num_tokens, _CONTEXT, np.int8)


def _find_fields(render: Render, message: Message, text: str) -> Iterator[_Field]:
    """Yield the fields of `message` that stand in `text`, which is `render(message)`."""
    for name, code in _FIELDS.items():
        if not message.get(name, "").strip():
            continue
        other = _render_or_none(render, {**message, name: _MARK})
        if other is not None:
            start, stop = _changed(text, other)
            if other == text[:start] + _MARK + text[stop:]:
                yield _Field(start, stop, _TOOL if message["role"] == "tool" else code)
    if "tool_calls" in message:
        names = [call["function"]["name"] for call in message["tool_calls"]]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        marked = {"type": "function", "function": {"name": _MARK, "arguments": {}}}
        # Some templates do not write a result without its call.
        others = (_render_or_none(render, m) for m in (rest, {**rest, "tool_calls": [marked]}))
        other = next((other for other in others if other is not None), None)
        if other is not None:
            start, stop = _changed(text, other)
            if all(name in text[start:stop] for name in names):
                yield _Field(start, stop, _TOOL)


def _render_or_none(render: Render, message: Message) -> str | None:
    try:
        return render(message)
    except TemplateError:
        return None


def _changed(text: str, other: str) -> tuple[int, int]:
    """The characters [start, stop) of `text` that differ from `other`; the end is compared first.

    >>> _changed("say <call> now", "say  now")
    (4, 10)
    """
    same_end = common_prefix_length(text[::-1], other[::-1])
    stop = len(text) - same_end
    return common_prefix_length(text[:stop], other[: len(other) - same_end]), stop


def _token_codes(tokenizer: Any, text: str, codes: np.ndarray) -> np.ndarray:
    """The kinds of the tokens of `text`: that of the last character, or of the first if context.

    Args:
        tokenizer: one that knows the places of its tokens; others give a text a single kind, that
            of its last character.
        text: what is tokenised.
        codes: the kinds of its characters, int8.
    """
    if not getattr(tokenizer, "is_fast", False):
        return np.full(len(tokenizer.encode(text, add_special_tokens=False)), codes[-1], np.int8)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    first = codes[np.minimum(places[:, 0], len(text) - 1)]
    last = codes[np.maximum(places[:, 1] - 1, 0)]
    return np.where(last == _CONTEXT, first, last)


def _paint(codes: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
    """Set what is not known yet."""
    unknown = codes[places] == _UNKNOWN
    codes[places[unknown]] = values[unknown]


def _cut(tree: PrefixTree, codes: np.ndarray) -> PrefixTree:
    """`tree` with a segment for each run of one kind."""
    segments: list[Segment] = []
    last: list[int] = []  # the last piece of each segment
    for start, segment in zip(tree.token_starts.tolist(), tree.segments, strict=True):
        stop = start + segment.length
        parent = None if segment.parent is None else last[segment.parent]
        edges = (start + 1 + np.flatnonzero(np.diff(codes[start:stop]))).tolist()
        for a, b in zip([start, *edges], [*edges, stop], strict=True):
            segments.append(Segment(b - a, parent, KINDS[codes[a]]))
            parent = len(segments) - 1
        last.append(len(segments) - 1)
    leaves = tuple(replace(leaf, segment=last[leaf.segment]) for leaf in tree.leaves)
    return PrefixTree(tuple(segments), leaves, tree.input_ids)
