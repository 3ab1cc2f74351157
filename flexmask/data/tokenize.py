"""Texts tokenised piece by piece: each piece once, and exactly as the whole text would be.

A Hugging Face tokenizer first cuts a text at the added tokens that it matches in the text as it is,
such as `<|im_start|>`. What it does to the text between two of them depends on that text alone. So
a prompt can be cut in front of such a token, and the pieces that it shares with earlier prompts of
the conversation are known already. This holds where

* the tokenizer is a fast one of transformers' own, made of the components of `tokenizers`, without
  dropout, and finds control tokens in texts (`split_special_tokens` is off);
* the token takes no space on its left (`lstrip`); there no cut is made;
* no such token looks at the text around it (`single_word`), and none that takes space on its right
  (`rstrip`) may meet one that begins with a space.

A piece begins with its token, so that only the first piece of a text is tokenised as the beginning
of a text is (Metaspace, `prepend_scheme="first"`). A tokenizer of which this cannot be said gets
its texts whole, and `why_whole` says why.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexmask.errors import TemplateError
from flexmask.tree.sample import common_prefix_length

# What a completion is tokenised behind where its first token would merge with the prompt's last:
# nothing, or characters that hardly any token holds beside others.
_BEFORE = ("", "\n", ".", "0")


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """For each text the ids of `tokenizer.encode(text, add_special_tokens=False)`, int64 [n].

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: best in an order in which neighbours begin alike, such as the prompts of a
            conversation: what a text shares with the one before is not looked at again.
    """
    if why_whole(tokenizer) is None:
        cut = _cut(texts, _raw_tokens(tokenizer))
    else:
        cut = [[text] for text in texts]
    unique = list(dict.fromkeys(piece for pieces in cut for piece in pieces))
    encoded = tokenizer(
        unique,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = [np.array(one, np.int64) for one in encoded["input_ids"]]
    known = dict(zip(unique, ids, strict=True))
    return [np.concatenate([known[piece] for piece in pieces]) for pieces in cut]


def encode_completion(
    tokenizer: Any, context: np.ndarray, whole: np.ndarray, completion: str
) -> np.ndarray:
    """The ids with which a model continues `context` when it writes `completion`, int64 [n].

    Those that come behind the context in the whole text, as they do in the prompts of later turns.
    Where the last token of the context would merge with the first of the completion, the completion
    is tokenised behind another character, or by itself if that does not mark it as the beginning of
    a text: a tokenizer that writes a space there (SentencePiece) would add one.

    Args:
        tokenizer: a Hugging Face tokenizer.
        context: ids of the prompt.
        whole: ids of prompt and completion, encoded as one text.
        completion: the text behind the prompt.

    Raises:
        TemplateError: no such ids were found that decode to the text, as it is or as the tokenizer
            normalises it.
    """
    shared = common_prefix_length(context, whole)
    if shared == context.size:
        return whole[shared:]
    start = max(shared - 4, 0)  # a character may be cut into as many tokens
    right = {
        _decode(tokenizer, context[start:]) + completion,
        _decode(tokenizer, whole[start:]),  # normalised
    }
    for before in _BEFORE:
        first, both = encode_texts(tokenizer, [before, before + completion])
        ids = both[first.size :]
        joined = _decode(tokenizer, np.concatenate((context[start:], ids)))
        if joined in right and (both[: first.size] == first).all():
            return ids
    raise TemplateError(
        f"the tokenizer cannot write {completion[:20]!r} behind the prompt, which ends with "
        f"{_decode(tokenizer, context[-3:])!r}: its first token merges with the prompt's last, or "
        "adds a space; use a fast tokenizer, or a template whose prompt ends with a special token"
    )


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    """The text of `ids`, every token and space of it."""
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _cut(texts: Sequence[str], tokens: Sequence[Any]) -> list[list[str]]:
    """The pieces of each text, in order, cut in front of added tokens."""
    contents = sorted((token.content for token in tokens), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, contents)))  # the longest that matches
    uncut = {token.content for token in tokens if token.lstrip}
    cut: list[list[str]] = []
    before, pieces, starts = "", [""], [0]
    for text in texts:
        # A cut of the text before is one of this text if both agree on all that decides on it.
        decided = common_prefix_length(before, text) - len(contents[0])
        last = max(bisect_right(starts, decided) - 1, 0)
        new = [starts[last]]
        for match in pattern.finditer(text, new[0]):
            if match.start() > new[0] and match[0] not in uncut:
                new.append(match.start())
        ends = [*new[1:], len(text)]
        pieces = pieces[:last] + [text[a:b] for a, b in zip(new, ends, strict=True)]
        before, starts = text, starts[:last] + new
        cut.append(pieces)
    return cut


def why_whole(tokenizer: Any) -> str | None:
    """Why texts cannot be cut into pieces for `tokenizer`; None where they can be."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return "the tokenizer is not a fast one"
    for name in ("__call__", "encode", "_encode_plus"):
        if getattr(type(tokenizer), name) is not getattr(PreTrainedTokenizerFast, name):
            return f"{type(tokenizer).__name__} has its own {name}"
    backend = tokenizer.backend_tokenizer
    if _is_custom(backend.normalizer) or _is_custom(backend.pre_tokenizer):
        return "the tokenizer has a component written in Python"
    if tokenizer.split_special_tokens:
        return "split_special_tokens is on"
    if getattr(backend.model, "dropout", None):
        return "the tokenizer has dropout"
    tokens = _raw_tokens(tokenizer)
    if not tokens:
        return "the tokenizer has no added token that it matches in the text as it is"
    if any(token.single_word for token in tokens):
        return "an added token is single_word"
    if any(token.rstrip for token in tokens) and any(t.content[0].isspace() for t in tokens):
        return "an added token takes space on its right, and another begins with a space"
    return None


def _raw_tokens(tokenizer: Any) -> list[Any]:
    """Added tokens that are matched before the text is normalised."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return [token for token in added if token.content and not token.normalized]


def _is_custom(component: Any) -> bool:
    kind = type(component).__name__
    if kind == "Sequence":
        return any(map(_is_custom, component))
    return kind in ("Normalizer", "PreTokenizer")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of the vocabulary, the rules of tokenising, the control tokens and the template.

    Two tokenizers of the same fingerprint render conversations into the same samples. The name of
    the tokenizer and where it was loaded from do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = tokenizer.get_vocab()
    if backend is not None:
        rules = json.loads(backend.to_str())
        for call_setting in ("truncation", "padding"):  # of the latest call, not of the tokenizer
            rules.pop(call_setting, None)
    parts = {
        "rules": rules,
        "control": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
