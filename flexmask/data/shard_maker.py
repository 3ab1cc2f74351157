"""One shard: its lines rendered into trees and written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexmask.data.files import BadLine, OnBadLine, read_line
from flexmask.data.prepared import shard_name
from flexmask.data.samples import Weighting
from flexmask.data.shards import write_shard
from flexmask.data.stretches import Stretch
from flexmask.data.trees import Renderer
from flexmask.errors import DataError
from flexmask.tree.tree import PrefixTree, build_tree


@dataclass(frozen=True, slots=True)
class ShardMaker:
    """Makes the shards of a folder.

    Attributes:
        folder: where they go.
        files: the data files' names, which become the places of errors and trees.
        tokenizer: a Hugging Face tokenizer with a chat template.
        weighting: as in `weigh_samples`.
        on_bad_line: "error" or "skip".
        chat_template_kwargs: settings for the chat template.
    """

    folder: Path
    files: tuple[str, ...]
    tokenizer: Any
    weighting: Weighting = "token"
    on_bad_line: OnBadLine = "error"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def make(self, stretch: Stretch) -> int:
        """Write the shard of `stretch`; returns how many conversations it holds.

        Raises:
            FlexmaskError: a line cannot be used, or the shard cannot be written.
        """
        trees: list[PrefixTree] = []
        places: list[tuple[int, int]] = []
        num_trained = 0
        bad_lines: list[dict[str, str]] = []
        renderer = Renderer(self.tokenizer, self.weighting, self.chat_template_kwargs)
        for file, line, text in stretch.lines:
            where = f"{self.files[file]}:{line}"
            samples = read_line(text, where, renderer.samples)
            if isinstance(samples, BadLine):
                if self.on_bad_line == "error" and samples.error is not None:
                    raise samples.error
                bad_lines.append({"where": where, "reason": samples.reason})
            elif samples is not None:
                trees.append(build_tree(samples))
                places.append((file, line))
                num_trained += sum(sample.num_trained for sample in samples)
        about = {
            "digest": stretch.digest,
            "num_sample_tokens": sum(tree.num_sample_tokens for tree in trees),
            "num_trained_tokens": num_trained,
            "bad_lines": bad_lines,
        }
        path = self.folder / shard_name(stretch.number)
        try:
            write_shard(path, trees, places, about)
        except OSError as error:
            reason = error.strerror or os.strerror(error.errno or 0)
            raise DataError(
                f"{path}: cannot be written: {reason}; make room, or free the folder for writing, "
                "and run the same command again: finished shards are kept"
            ) from None
        return len(trees)
