"""Machine code of NVIDIA chips from sm_80 on, read from a cubin: its loops, and what is in them.

The disassembler takes half a second for each kernel, so the few operations that matter are told by
their numbers, those of Mesa's open compiler (src/nouveau/compiler/nak/sm70_encode.rs); a test holds
them to the disassembler. An instruction has 16 bytes. Its low 12 bits are the operation, the next 4
the predicate.
"""

import struct
from typing import NamedTuple

_OPERATIONS = {
    0x387: "STL",
    0x983: "LDL",
    0x94D: "EXIT",
    0x950: "RET",
    0x947: "BRA",
    0x547: "BRA.U",
    0x944: "CALL",
}
_MUFU, _EX2 = 0x308, 2  # an operation and one of its functions
BRANCHES = ("BRA", "BRA.U", "CALL")
NAMES = ("MUFU.EX2", *_OPERATIONS.values())
_ALWAYS = 7  # the predicate that is true
_SECTION = struct.Struct("<IIQQQQIIQQ")  # of ELF: name, type, flags, address, offset, size, ..


class Instruction(NamedTuple):
    """An operation by name, "" for one that does not matter, and what may come after it."""

    name: str
    target: int | None  # index of the instruction that is branched to
    falls_through: bool


class Loop(NamedTuple):
    """Instructions of a loop, those among them that are MUFU.EX2, those that use the stack."""

    size: int
    exponents: int
    spills: int


def innermost_loops(cubin, capability):
    """The innermost loops with exponents in the one kernel of a cubin, in the order of the code."""
    code = decode(cubin, capability)
    loops = {body: _count(code, body) for body in _natural_loops(code)}
    loops = {body: loop for body, loop in loops.items() if loop.exponents}
    return [loops[x] for x in sorted(loops, key=min) if not any(other < x for other in loops)]


def _count(code, body):
    names = [code[place].name for place in body]
    return Loop(len(body), names.count("MUFU.EX2"), names.count("STL") + names.count("LDL"))


def decode(cubin, capability):
    """The instructions of the one kernel in a cubin."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    _, number, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [_SECTION.unpack_from(cubin, table + _SECTION.size * n) for n in range(number)]
    names = sections[names_index][4]
    for name, _, _, _, offset, size, *_ in sections:
        if cubin.startswith(b".text.", names + name):
            words = (
                int.from_bytes(cubin[at : at + 16], "little")
                for at in range(offset, offset + size, 16)
            )
            return [_instruction(place, word, capability) for place, word in enumerate(words)]
    raise ValueError("the cubin has no code")


def _instruction(place, word, capability):
    name = _OPERATIONS.get(word & 0xFFF, "")
    if word & 0xFFF == _MUFU and (word >> 74) & 0x3F == _EX2:
        name = "MUFU.EX2"
    target = None
    if name in BRANCHES:
        distance = (word >> 34) & (2**48 - 1)
        distance -= distance >> 47 << 48
        if capability >= 90:  # has 8 more bits, elsewhere
            distance = distance << 8 | (word >> 16) & 0xFF
        target = place + 1 + distance // 4
    stops = name in ("BRA", "EXIT", "RET") and (word >> 12) & 0xF == _ALWAYS
    return Instruction(name, target, not stops)


def _natural_loops(code):
    """The instructions of each loop: what leads to a branch back to its head, from the head on."""
    before = [set() for _ in code]
    backward = []
    state = [0] * len(code)  # 1 on the path of the search, 2 done
    path = [(0, iter(_after(code, 0)))]
    state[0] = 1
    while path:
        place, rest = path[-1]
        following = next(rest, None)
        if following is None:
            state[place] = 2
            path.pop()
            continue
        before[following].add(place)
        if state[following] == 1:
            backward.append((place, following))
        elif not state[following]:
            state[following] = 1
            path.append((following, iter(_after(code, following))))
    for end, head in backward:
        body, waiting = {head}, [end]
        while waiting:
            place = waiting.pop()
            if place not in body:
                body.add(place)
                waiting.extend(before[place])
        yield frozenset(body)


def _after(code, place):
    _, target, falls_through = code[place]
    return [*([target] if target is not None else []), *([place + 1] if falls_through else [])]
