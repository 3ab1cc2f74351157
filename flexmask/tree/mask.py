"""TreeMask, the mask of a batch of packed rows as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexmask.errors import MaskError
from flexmask.tree.chains import Slice, mask_slices
from flexmask.tree.intervals import check_position_ids, check_subtree_end, count_visible
from flexmask.tree.tiles import TileRanges, tile_ranges

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from flexmask.tree.block_mask import MaskMod

_DRAWN_BLOCKS = 24  # at most so many tiles on a side in `str(mask)`


@dataclass(frozen=True, eq=False, slots=True)
class TreeMask:
    """The mask of B packed rows of L tokens: token q sees token k where k <= q < subtree_end[k].

    A value object of O(L) memory: nothing here, apart from `to_dense`, is of size L x L.

    Attributes:
        subtree_end: int32 [B, L]; one row [L], arrays and lists are accepted.
        position_ids: int32 [B, L], depth of each token in its tree, or None. Only sliding windows
            and chunks need it, because they count positions, not packed indices. They follow from
            `subtree_end`: of the tokens before q, those that q sees are its ancestors.

    Raises:
        MaskError: a shape that does not fit, or (checked on CPU tensors only, since looking at a
            CUDA tensor waits for the device) values that are not subtree ends in preorder, or
            positions that are not the depths that these say.

    >>> mask = TreeMask([3, 2, 3])  # a root with two children: they do not see each other
    >>> mask.to_dense().int().tolist()
    [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    """

    subtree_end: Tensor
    position_ids: Tensor | None = None

    def __post_init__(self) -> None:
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
        return TreeMask(self.subtree_end.to(device), positions)

    @property
    def mask_mod(self) -> MaskMod:
        """The mask as FlexAttention's callable (b, h, q_idx, kv_idx) -> bool tensor."""
        subtree_end = self.subtree_end

        def tree_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx <= q_idx) & (q_idx < subtree_end[b, kv_idx])

        return tree_mask

    def to_block_mask(self, block_size: int = 128) -> BlockMask:
        """FlexAttention's BlockMask [B, 1, L, L], identical to `create_block_mask`'s.

        O(L) time plus O(visited tiles), instead of O(L^2). Waits for the device on CUDA.

        Args:
            block_size: tile size in tokens, for queries and keys alike.
        """
        from flexmask.tree.block_mask import build_block_mask

        return build_block_mask(self._rows(), block_size, self.mask_mod, self.device)

    def tiles(self, block_q: int = 128, block_k: int = 128) -> tuple[TileRanges, ...]:
        """The tile ranges of each row, for tiles of block_q queries by block_k keys."""
        return tuple(tile_ranges(end, block_q, block_k) for end in self._rows())

    def slices(self) -> tuple[list[Slice], ...]:
        """The rectangles of each row that cover its visible pairs exactly once."""
        return tuple(mask_slices(end) for end in self._rows())

    @property
    def num_visible(self) -> int:
        """Number of visible pairs (q, k) in all rows."""
        return sum(count_visible(end) for end in self._rows())

    def density(self, block: int = 128) -> float:
        """Visible pairs per pair in a visited tile of block x block; 1.0 wastes no work."""
        visited = sum(row.num_visited for row in self.tiles(block, block))
        return self.num_visible / (visited * block * block)

    def to_dense(self) -> Tensor:
        """The mask as bool [B, L, L]; O(L^2) memory, for tests and small pictures."""
        index = torch.arange(self.subtree_end.shape[1], device=self.device)
        causal = index[None, :] <= index[:, None]
        return causal & (index[None, :, None] < self.subtree_end[:, None, :])

    def __repr__(self) -> str:
        B, L = self.shape
        return f"TreeMask(rows={B}, tokens={L}, visible={self.num_visible:,})"

    def __str__(self) -> str:
        """The first row as tiles: full, partial and empty, queries downwards, keys to the right."""
        B, L = self.shape
        block = max(1, -(-L // _DRAWN_BLOCKS))
        tiles = tile_ranges(self._rows()[0], block, block)
        grid = np.full((tiles.num_q_blocks, tiles.first.size), "·")
        query, key, is_full = tiles.pairs()
        grid[query, key] = np.where(is_full, "█", "▒")
        heading = f"{self!r}, tiles of {block}" + (", row 0" if B > 1 else "")
        return "\n".join([heading, *("".join(line) for line in grid)])

    def _rows(self) -> np.ndarray:
        return self.subtree_end.cpu().numpy()


def _as_rows(values: object, name: str) -> Tensor:
    tensor = torch.as_tensor(values)
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise MaskError(f"{name} must be [B, L] or [L] and not empty, got {list(tensor.shape)}")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise MaskError(f"{name} must hold integers, got {tensor.dtype}")
    return tensor.to(torch.int32)
