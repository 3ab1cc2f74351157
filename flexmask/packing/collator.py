"""TreeCollator, the way from conversations to a batch inside any PyTorch data loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmask.data.jinja import check_template
from flexmask.data.renderer import Renderer
from flexmask.data.samples import weigh_samples
from flexmask.errors import DataError
from flexmask.packing.fitting import Overflow, check_budget
from flexmask.packing.rows import PackedRow, PackedRows, check_multiple, pack, stack_rows
from flexmask.tree.build import build_tree
from flexmask.tree.sample import Sample
from flexmask.tree.tree import PrefixTree

if TYPE_CHECKING:
    from torch import Tensor


class TreeCollator:
    """Turns a list of conversations into one batch of packed rows: `TreeTrainer`'s `data_collator`.

    Each item may be a conversation (a dict with `messages` or `conversations`, a list of messages,
    or a parsed `Conversation`), the samples of one conversation, or a finished PrefixTree. Without
    items (a process for which `TreeBatchSampler` has no tree) the batch is padding alone.

    Only a model that `patch` was called on knows what `subtree_end` is. Others either refuse it as
    an unexpected argument or, where their forward takes `**kwargs`, ignore it and take a packed row
    for one sequence, in silence: `TreeTrainer` checks; in a loop of your own, `is_patched` does.

    Attributes:
        tokenizer: a Hugging Face tokenizer with a chat template; may be None where every item is
            made of samples or trees.
        max_tokens: budget of a row, in tokens; None packs everything into one row.
        on_overflow: what `pack` does with a conversation larger than `max_tokens`.
        renderer: renders and weighs conversations, and weighs samples; trees are taken as they are.
            Its date, where none is given, is that of making the collator.
        pad_to_multiple_of: rows are padded to a common multiple of this many tokens; 128 is what
            FlexAttention is fast with on a GPU.
        num_dropped, num_truncated: how many samples `on_overflow` has left out or cut so far.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        max_tokens: int | None = None,
        on_overflow: Overflow = "split",
        pad_to_multiple_of: int = 1,
        **rendering: Any,
    ) -> None:
        """Keep the settings.

        `rendering` is attributes of `Renderer`: `weighting`, `chat_template_kwargs`,
        `thinking_history`, `system` and so on.

        Raises:
            DataError, TemplateError: a setting or the chat template cannot be used.
        """
        check_budget(max_tokens, on_overflow)
        if getattr(tokenizer, "chat_template", None):  # one without will do for samples and trees
            check_template(tokenizer)
        check_multiple(pad_to_multiple_of)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.on_overflow = on_overflow
        self.renderer = Renderer(tokenizer, **rendering).dated()
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_dropped = self.num_truncated = 0

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of `items`: tensors [B, L] as `stack_rows` describes them."""
        rows = PackedRows([PackedRow.empty()])
        if items:
            trees = [self.tree(item) for item in items]
            rows = pack(trees, self.max_tokens, on_overflow=self.on_overflow)
        self.num_dropped += len(rows.dropped)
        self.num_truncated += rows.split.truncated_samples
        return stack_rows(
            rows,
            pad_token_id=getattr(self.tokenizer, "pad_token_id", None) or 0,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def tree(self, item: Any) -> PrefixTree:
        """The prefix tree of one item."""
        return item if isinstance(item, PrefixTree) else build_tree(self.samples(item))

    def samples(self, item: Any) -> list[Sample]:
        """The weighted samples of one conversation, or of a list of samples."""
        if isinstance(item, Sequence) and item and isinstance(item[0], Sample):
            return weigh_samples(item, self.renderer.weighting)
        if isinstance(item, Mapping) and "input_ids" in item:
            raise DataError(
                f"got a row that the trainer has tokenised, with the keys {[*item]}; it must "
                "hand on conversations: docs/trainers.md has the four settings of TRL's SFTConfig "
                "that keep it from rendering and packing"
            )
        if self.tokenizer is None:
            raise DataError(
                "TreeCollator needs a tokenizer to render conversations, got None; an item of type "
                f"{type(item).__name__} is neither a PrefixTree nor a list of Sample"
            )
        return self.renderer.samples(item)
