"""Which tiles a program visits: integers per block, computed on the device, never read by the host.

The keys of block j are consecutive and each sees itself, so the queries that see at least one of
them are [first key, max end), and those that see all of them are [last key, min end). In blocks of
queries, with hi = ceil(max end / BLOCK_Q) and lo = floor(min end / BLOCK_Q) (0 for a ragged block):

    visited  [j BLOCK_K // BLOCK_Q, hi)        full  [ceil(last key / BLOCK_Q), lo)

A program that owns a block of keys walks these two ranges and needs no list (`key_ranges_kernel`).
A program that owns a block of queries, or any program where a floor cuts the ranges into pieces,
walks a list of blocks (`list_tiles_kernel`): `for` loops over a list are pipelined by the compiler,
a `while` loop that jumps over dead blocks is not.

Memory, all int32:

    bounds [rows, 4, num_blocks]       highest end, lowest end, lowest and highest reach: positions
                                       of a block of keys, floors of a block of queries
    plan [rows, num_lines, 4]          numbers of full and of partial tiles; without lists also the
                                       first block, and the number of partial tiles before the full
    tiles [rows, num_lines, capacity]  full tiles from the front, partial ones from the back
    order [rows, num_lines]            lines by falling number of tiles

A line is the block that a program owns. `tiles` is a rectangle of which only the entries in use are
ever written or read: 4 bytes per tile of 128 x 64 pairs is 8 MB of addresses at 128K tokens.
"""

import triton
import triton.language as tl


@triton.jit
def key_block_range(highest, lowest, block, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """First and last query block that see some, and first and last that see all of a key block."""
    first = block * BLOCK_K // BLOCK_Q
    last = (highest + BLOCK_Q - 1) // BLOCK_Q
    full_first = (block * BLOCK_K + BLOCK_K - 1 + BLOCK_Q - 1) // BLOCK_Q
    full_last = lowest // BLOCK_Q
    return first, last, full_first, full_last


@triton.jit
def end_bounds(end_ptr, start, L, BLOCK: tl.constexpr):
    """The highest and the lowest subtree end of [start, start + BLOCK), 0 for tokens beyond L."""
    token = start + tl.arange(0, BLOCK)
    end = tl.load(end_ptr + token, mask=token < L, other=0)
    return tl.max(end, 0), tl.min(end, 0)


@triton.jit(do_not_specialize=["L", "num_blocks"])
def block_bounds_kernel(
    end_ptr, reach_ptr, bounds_ptr, L, num_blocks, BLOCK: tl.constexpr, HAS_FLOOR: tl.constexpr
):
    """Write the bounds of one block; grid (num_blocks, rows)."""
    block, row = tl.program_id(0), tl.program_id(1)
    out_ptr = bounds_ptr + row * 4 * num_blocks + block
    highest, lowest = end_bounds(end_ptr + tl.cast(row, tl.int64) * L, block * BLOCK, L, BLOCK)
    tl.store(out_ptr, highest)
    tl.store(out_ptr + num_blocks, lowest)
    if HAS_FLOOR:
        token = block * BLOCK + tl.arange(0, BLOCK)
        reach_ptr += tl.cast(row, tl.int64) * L
        # a ragged block repeats its last token
        reach = tl.load(reach_ptr + tl.minimum(token, L - 1))
        tl.store(out_ptr + 2 * num_blocks, tl.min(reach, 0))
        tl.store(out_ptr + 3 * num_blocks, tl.max(reach, 0))


@triton.jit(do_not_specialize=["L", "num_lines"])
def key_ranges_kernel(
    end_ptr, plan_ptr, L, num_lines, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Write the plan of one block of keys; grid (num_lines, rows)."""
    line, row = tl.program_id(0), tl.program_id(1)
    end_ptr += tl.cast(row, tl.int64) * L
    highest, lowest = end_bounds(end_ptr, line * BLOCK_K, L, BLOCK_K)
    first, last, full_first, full_last = key_block_range(highest, lowest, line, BLOCK_Q, BLOCK_K)
    num_full = tl.maximum(full_last - full_first, 0)
    num_partial = last - first - num_full
    plan_ptr += (row * num_lines + line) * 4
    tl.store(plan_ptr, num_full)
    tl.store(plan_ptr + 1, num_partial)
    tl.store(plan_ptr + 2, first)
    tl.store(plan_ptr + 3, tl.minimum(full_first - first, num_partial))


@triton.jit(do_not_specialize=["num_q_blocks", "num_k_blocks"])
def list_tiles_kernel(
    query_bounds_ptr,  # read with a floor only
    key_bounds_ptr,
    plan_ptr,
    tiles_ptr,
    num_q_blocks,
    num_k_blocks,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_KEY: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """List the tiles of one line; grid (num_lines, rows), lines of keys if BY_KEY, else of queries.

    With a floor a tile is visited unless its highest key is below the lowest floor, which may visit
    a tile without any visible pair; it is full only if its lowest key is not below any floor.
    """
    line, row = tl.program_id(0), tl.program_id(1)
    key_bounds_ptr += row * 4 * num_k_blocks
    if BY_KEY:
        num_lines, capacity = num_k_blocks, num_q_blocks
        first_other = line * BLOCK_K // BLOCK_Q
        last_other = capacity
    else:
        num_lines, capacity = num_q_blocks, num_k_blocks
        first_other = 0
        last_other = tl.minimum(capacity, ((line + 1) * BLOCK_Q + BLOCK_K - 1) // BLOCK_K)
    tiles_ptr += tl.cast(row * num_lines + line, tl.int64) * capacity
    num_full = 0
    num_partial = 0
    for start in range(first_other, last_other, CHUNK):
        other = start + tl.arange(0, CHUNK)
        inside = other < last_other
        if BY_KEY:
            query, key = other, line + tl.zeros_like(other)
        else:
            query, key = line + tl.zeros_like(other), other
        highest = tl.load(key_bounds_ptr + key, mask=inside, other=0)
        lowest = tl.load(key_bounds_ptr + num_k_blocks + key, mask=inside, other=0)
        first, last, full_first, full_last = key_block_range(highest, lowest, key, BLOCK_Q, BLOCK_K)
        visited = inside & (first <= query) & (query < last)
        full = (full_first <= query) & (query < full_last)
        if HAS_FLOOR:
            bounds_ptr = query_bounds_ptr + row * 4 * num_q_blocks + query
            low_floor = tl.load(bounds_ptr + 2 * num_q_blocks, mask=inside, other=0)
            high_floor = tl.load(bounds_ptr + 3 * num_q_blocks, mask=inside, other=0)
            low_key = tl.load(key_bounds_ptr + 2 * num_k_blocks + key, mask=inside, other=0)
            high_key = tl.load(key_bounds_ptr + 3 * num_k_blocks + key, mask=inside, other=0)
            visited = visited & (high_key >= low_floor)
            full = full & (low_key >= high_floor)
        full = full & visited
        partial = visited & (full == 0)
        full_place = num_full + tl.cumsum(full.to(tl.int32), 0) - 1
        partial_place = num_partial + tl.cumsum(partial.to(tl.int32), 0) - 1
        tl.store(tiles_ptr + full_place, other, mask=full)
        tl.store(tiles_ptr + capacity - 1 - partial_place, other, mask=partial)
        num_full += tl.sum(full.to(tl.int32), 0)
        num_partial += tl.sum(partial.to(tl.int32), 0)
    plan_ptr += (row * num_lines + line) * 4
    tl.store(plan_ptr, num_full)
    tl.store(plan_ptr + 1, num_partial)


@triton.jit(do_not_specialize=["num_lines"])
def order_lines_kernel(plan_ptr, order_ptr, num_lines, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Sort lines by falling number of tiles, ties by index; grid (ceil(num_lines / BLOCK), rows).

    A line's rank is the number of lines in front of it: O(num_lines^2) comparisons, of 1,024 lines
    at 128K tokens, in place of a sort that would take several launches.
    """
    row = tl.program_id(1)
    plan_ptr += row * num_lines * 4
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(plan_ptr + line * 4, mask=line < num_lines, other=0)
    size += tl.load(plan_ptr + line * 4 + 1, mask=line < num_lines, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_lines, CHUNK):
        other = start + tl.arange(0, CHUNK)
        inside = other < num_lines
        other_size = tl.load(plan_ptr + other * 4, mask=inside, other=-1)
        other_size += tl.load(plan_ptr + other * 4 + 1, mask=inside, other=-1)
        is_larger = other_size[None, :] > size[:, None]
        is_tie = (other_size[None, :] == size[:, None]) & (other[None, :] < line[:, None])
        rank += tl.sum((is_larger | is_tie).to(tl.int32), 1)
    tl.store(order_ptr + row * num_lines + rank, line, mask=line < num_lines)
