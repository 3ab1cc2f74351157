"""What a verification is limited to, and what it is expected to take."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import PreTrainedModel

from flexmask.errors import FlexmaskError, pluralize
from flexmask.model.cost import CostModel
from flexmask.model.load import meta_model
from flexmask.model.structure import text_config
from flexmask.model.work import npass_work, single_pass_work
from flexmask.tools.expect import expected
from flexmask.tools.plan.memory import saved_bytes_per_token
from flexmask.tools.verify.proof import WIDER, Chat
from flexmask.tree.build import build_tree

# Of the weights, beside the model: one in a type of twice the size; the gradients of a turn three
# times, of which one is of that size; those of the step, so far, twice, in both types.
_COPIES = 2 + (1 + 1 + 2) + (1 + 2)


def within(chats: Sequence[Chat], max_tokens: int) -> tuple[list[Chat], str | None]:
    """The first turns of `chats` that have at most so many tokens in N-pass, and what is left out.

    The first turn is always among them.
    """
    kept: list[Chat] = []
    room = max_tokens
    for chat in chats:
        number = 0
        for sample in chat.samples:
            if len(sample) > room and (kept or number):
                break
            room -= len(sample)
            number += 1
        if number:
            kept.append(
                chat if number == len(chat.samples) else Chat(chat.samples[:number], chat.where)
            )
        if number < len(chat.samples):
            break
    left = [sum(len(chat.samples) for chat in some) for some in (chats, kept)]
    if left[0] == left[1]:
        return kept, None
    return kept, (
        f"{pluralize(left[0] - left[1], 'turn')} of {left[0]} left out, beyond --max_verify_tokens "
        f"{max_tokens}"
    )


def expected_of(model: PreTrainedModel, chats: Sequence[Chat]) -> str | None:
    """The memory and time of verifying `chats`, in words; None if the model's cost is not known."""
    try:
        cost = CostModel.of(model)
        saved = saved_bytes_per_token(meta_model(copy.deepcopy(model.config), model.dtype))
    except FlexmaskError:
        return None
    samples = [sample for chat in chats for sample in chat.samples]
    npass = cost.flops(npass_work(map(len, samples), cost.windows))
    rows = [cost.flops(single_pass_work(build_tree(chat.samples), cost.windows)) for chat in chats]
    # A turn each, the step, the mask forward twice, and the negative control in one row.
    repeats = (len(chat.samples) + 1 + 2 / 3 for chat in chats)
    passes = max(rows) + sum(n * row for n, row in zip(repeats, rows, strict=True))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    num_bytes = None
    if saved is not None:
        per_token = saved + text_config(model).vocab_size * (model.dtype.itemsize + 4)
        step = sum(len(chat.row) for chat in chats)
        num_bytes = _COPIES * size + per_token * max(step, 2 * max(map(len, samples)))
    flops = {model.dtype: passes + npass, WIDER[model.dtype]: npass}
    return expected(flops, num_bytes, model.device)
