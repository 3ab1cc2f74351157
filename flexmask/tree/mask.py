"""TreeMask, the mask of a batch of packed rows as a value, and its compiler from trees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexmask.errors import MaskError
from flexmask.tree.chains import Slice, mask_slices
from flexmask.tree.intervals import (
    MaskMod,
    check_position_ids,
    check_subtree_end,
    check_window,
    dense_mask,
    find_depths,
    find_window_start,
    mask_mod,
)
from flexmask.tree.layout import concatenate, lay_out
from flexmask.tree.tiles import Tiles, tiles_of_rows
from flexmask.tree.tree import PrefixTree, one_or_more_trees

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_DRAWN_BLOCKS = 24  # at most so many tiles on a side in `str(mask)`


@dataclass(frozen=True, eq=False, slots=True)
class TreeMask:
    """The mask of B packed rows of L tokens: token q sees token k where k <= q < subtree_end[k].

    A value object of O(L) memory: nothing here, apart from `to_dense`, is of size L x L.

    Attributes:
        subtree_end: int32 [B, L]; one row [L], arrays and lists are accepted.
        position_ids: int32 [B, L], depth of each token in its tree, or None; for a model's
            embedding. The mask needs none: of the tokens before q, those that q sees are its
            ancestors.
        window: a query sees only keys less than `window` positions before it, or None. Positions
            are depths, not packed indices.
        chunk: a query sees only keys of its own chunk of `chunk` positions, or None.

    Raises:
        MaskError: a shape that does not fit, a window below 1, or (checked on CPU tensors only,
            since looking at a CUDA tensor waits for the device) values that are not subtree ends in
            preorder, or positions that are not the depths that these say.

    >>> mask = TreeMask([3, 2, 3])  # a root with two children: they do not see each other
    >>> mask.to_dense().int().tolist()
    [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    >>> TreeMask([3, 3, 3], window=2).to_dense().int().tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]
    """

    subtree_end: Tensor
    position_ids: Tensor | None = None
    window: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_window(self.window, self.chunk)
        end = _as_rows(self.subtree_end, "subtree_end")
        positions = self.position_ids
        if positions is not None:
            positions = _as_rows(positions, "position_ids")
            if positions.shape != end.shape:
                raise MaskError(
                    f"position_ids must have the shape of subtree_end, {list(end.shape)}, "
                    f"got {list(positions.shape)}"
                )
        object.__setattr__(self, "subtree_end", end)
        object.__setattr__(self, "position_ids", positions)
        if end.device.type == "cpu" and not torch.compiler.is_compiling():
            for row in end.numpy():
                check_subtree_end(row)
            if positions is not None and positions.device.type == "cpu":
                for row, depths in zip(end.numpy(), positions.numpy(), strict=True):
                    check_position_ids(row, depths)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L): number of rows, tokens in each."""
        B, L = self.subtree_end.shape
        return B, L

    @property
    def device(self) -> torch.device:
        """Where the mask lives."""
        return self.subtree_end.device

    def to(self, device: torch.device | str) -> TreeMask:
        """The same mask on `device`."""
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return replace(self, subtree_end=self.subtree_end.to(device), position_ids=positions)

    @property
    def window_start(self) -> Tensor | None:
        """The first token that each query sees, int32 [B, L]; None without window and chunk."""
        return find_window_start(self.subtree_end, window=self.window, chunk=self.chunk)

    @property
    def mask_mod(self) -> MaskMod:
        """The mask as FlexAttention's callable (b, h, q_idx, kv_idx) -> bool tensor.

        `torch.nn.attention.flex_attention.and_masks` joins it with others.
        """
        return mask_mod(self.subtree_end, self.window_start)

    def to_block_mask(self, block_size: int = 128) -> BlockMask:
        """FlexAttention's BlockMask [B, 1, L, L], identical to `create_block_mask`'s.

        O(L) time plus O(visited tiles), instead of O(L^2). Waits for the device on CUDA.

        Args:
            block_size: tile size in tokens, for queries and keys alike.
        """
        from flexmask.tree.block_mask import build_block_mask

        tiles = self.tiles(block_size, block_size)
        return build_block_mask(tiles, self.shape[1], block_size, self.mask_mod, self.device)

    def tiles(self, block_q: int = 128, block_k: int = 128) -> tuple[Tiles, ...]:
        """The tiles of each row that hold a visible pair, of block_q queries by block_k keys."""
        return tiles_of_rows(self.subtree_end, self.window_start, block_q, block_k)

    def slices(self) -> tuple[list[Slice], ...]:
        """The rectangles of each row that cover its visible pairs exactly once.

        Raises:
            MaskError: the mask has a window or chunk, whose pairs are no rectangles.
        """
        if self.window is not None or self.chunk is not None:
            raise MaskError(
                f"slices cover a mask without window and chunk, got {self!r}; use tiles"
            )
        return tuple(mask_slices(end) for end in self.subtree_end.cpu().numpy())

    @property
    def num_visible(self) -> int:
        """Number of visible pairs (q, k) in all rows."""
        depth = np.stack([find_depths(end) for end in self.subtree_end.cpu().numpy()])
        start = self.window_start
        if start is not None:
            depth = depth - np.take_along_axis(depth, start.cpu().numpy().astype(np.int64), 1)
        return int((depth + 1).sum())

    def density(self, block: int = 128) -> float:
        """Visible pairs per pair in a visited tile of block x block; 1.0 wastes no work."""
        visited = sum(row.num_visited for row in self.tiles(block, block))
        return self.num_visible / (visited * block * block)

    def to_dense(self) -> Tensor:
        """The mask as bool [B, L, L]; O(L^2) memory, for tests and small pictures."""
        return dense_mask(self.subtree_end, self.window_start)

    def __repr__(self) -> str:
        B, L = self.shape
        limits = {"window": self.window, "chunk": self.chunk}
        named = "".join(f", {name}={size:,}" for name, size in limits.items() if size is not None)
        return f"TreeMask(rows={B}, tokens={L}{named}, visible={self.num_visible:,})"

    def __str__(self) -> str:
        """The first row as tiles: full, partial and empty, queries downwards, keys to the right."""
        B, L = self.shape
        block = max(1, -(-L // _DRAWN_BLOCKS))
        tiles, *_ = self.tiles(block, block)
        grid = np.full((tiles.num_q_blocks, tiles.num_k_blocks), "·")
        grid[tiles.query, tiles.key] = np.where(tiles.is_full, "█", "▒")
        heading = f"{self!r}, tiles of {block}" + (", row 0" if B > 1 else "")
        return "\n".join([heading, *("".join(line) for line in grid)])


def compile_mask(
    trees: PrefixTree | Iterable[PrefixTree],
    *,
    window: int | None = None,
    chunk: int | None = None,
) -> TreeMask:
    """The mask of one packed row that holds `trees` one after the other, each heavy-first.

    Args:
        trees: a tree or several; lengths are enough, tokens are not looked at.
        window: as in `TreeMask`, like the next.
        chunk: likewise.

    Returns:
        A TreeMask of one row, with position ids, on the CPU.

    Raises:
        MaskError: no trees, or something else.

    >>> from flexmask import PrefixTree
    >>> tree = PrefixTree.from_turns([(60, 300, 120)] * 8)
    >>> compile_mask(tree)
    TreeMask(rows=1, tokens=4680, visible=3,897,540)
    >>> compile_mask(tree, window=1024)
    TreeMask(rows=1, tokens=4680, window=1,024, visible=3,424,602)
    """
    layout = concatenate([lay_out(tree) for tree in one_or_more_trees(trees, "compile_mask")])
    end, positions = (torch.from_numpy(x) for x in (layout.subtree_end, layout.position_ids))
    return TreeMask(end, positions, window, chunk)


def _as_rows(values: object, name: str) -> Tensor:
    # a copy of an array: whoever writes to it later does not write to the mask
    tensor = torch.tensor(values) if isinstance(values, np.ndarray) else torch.as_tensor(values)
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise MaskError(f"{name} must be [B, L] or [L] and not empty, got {list(tensor.shape)}")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise MaskError(f"{name} must hold integers, got {tensor.dtype}")
    return tensor.to(torch.int32)
