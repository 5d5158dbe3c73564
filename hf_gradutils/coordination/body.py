"""The variables that the body of a ``with`` statement reads, from its byte code; checked on Python 3.11 to 3.14.

A body that cannot be found, of a context that a call enters, reads nothing.
"""

import dis
import functools
import inspect
import itertools
import re
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple

_LOAD, _STORE = "LOAD", "STORE"
_LOCALS = ("locals", "vars", "eval", "exec", "dir")


class Reads(NamedTuple):
    """The variables that the body of a block reads, and how they are set."""

    chains: frozenset[tuple[str, ...]]
    """Variables with the attributes that are read of them: ``("self", "path")``."""

    set_in_loop: frozenset[str]
    """Variables that a loop around the block sets ahead of it."""

    set_by_for: frozenset[str]
    """Those of them that are the targets of ``for``."""

    parameters: frozenset[str]

    has_locals: bool
    """True if the function may hold what ``locals()`` returns."""


@functools.lru_cache(maxsize=512)
def reads_of_body(code: CodeType, at: int) -> Reads:
    """Read the byte code of ``code``, which is about to enter a block at offset ``at``."""
    instructions = list(dis.get_instructions(code))
    end = _end_of_body(code, instructions, at)
    in_loop = _loop_around(instructions, at, end)
    set_in_loop = _names(in_loop, _STORE)
    parameters = _parameters(code)
    body = [i for i in instructions if at < i.offset < end]
    set_inside = _names(body, _STORE) - set_in_loop - parameters
    chains = (tuple(name.split(".")) for name in _names(body, _LOAD))
    return Reads(
        chains=frozenset(chain for chain in chains if chain[0] not in set_inside),
        set_in_loop=set_in_loop,
        set_by_for=_targets_of_for(in_loop),
        parameters=parameters,
        has_locals=any(i.argval in _LOCALS and i.opname in ("LOAD_GLOBAL", "LOAD_NAME") for i in instructions),
    )


def _loop_around(instructions: list[dis.Instruction], at: int, end: int) -> list[dis.Instruction]:
    """The instructions of the outermost loop around the block, without the block."""
    jumps_back = ((i.argval, i.offset) for i in instructions if "JUMP_BACKWARD" in i.opname)
    around = [(first, last) for first, last in jumps_back if first <= at < last]
    if not around:
        return []
    begin, last = min(first for first, _ in around), max(last for _, last in around)
    return [i for i in instructions if begin <= i.offset < at or end <= i.offset < last]


def _targets_of_for(instructions: list[dis.Instruction]) -> frozenset[str]:
    heads = [index for index, i in enumerate(instructions) if i.opname == "FOR_ITER"]
    unpacking = [list(itertools.takewhile(_unpacks, instructions[head + 1 :])) for head in heads]
    return frozenset().union(*(_names(targets, _STORE) for targets in unpacking))


def _parameters(code: CodeType) -> frozenset[str]:
    number = code.co_argcount + code.co_kwonlyargcount
    number += sum(bool(code.co_flags & flag) for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS))
    return frozenset(code.co_varnames[:number])


def _names(instructions: list[dis.Instruction], kind: str) -> frozenset[str]:
    return frozenset(name for other, name in _accesses(instructions) if other == kind)


def _unpacks(instruction: dis.Instruction) -> bool:
    return instruction.opname.startswith((_STORE, "UNPACK"))


def _end_of_body(code: CodeType, instructions: list[dis.Instruction], at: int) -> int:
    """The offset behind the body, the last that the ``with`` statement's handler covers; ``at`` if there is none."""
    following = next((i.offset for i in instructions if i.offset > at), at)
    by_offset = {i.offset: index for index, i in enumerate(instructions)}
    entries = getattr(dis.Bytecode(code), "exception_entries", ())
    handler = next((entry.target for entry in entries if entry.start == following), None)
    if handler is not None:
        opnames = [i.opname for i in instructions[by_offset.get(handler, 0) :][:2]]
        if "WITH_EXCEPT_START" in opnames:
            return max(int(entry.end) for entry in entries if entry.target == handler)
    return at  # entered by a call: ExitStack


def _accesses(instructions: list[dis.Instruction]) -> Iterator[tuple[str, str]]:
    """``(LOAD or STORE, name)`` in order; a name has the attributes that are read at once: ``self.path``."""
    loaded = ""
    for i in instructions:
        if i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            loaded = loaded and f"{loaded}.{i.argval}"
            continue
        if loaded:
            yield _LOAD, loaded
            loaded = ""
        if i.opname == "LOAD_CONST" and isinstance(i.argval, CodeType):  # a lambda, a comprehension
            own = {*i.argval.co_varnames, *i.argval.co_cellvars}
            for kind, name in _accesses(list(dis.get_instructions(i.argval))):
                if kind == _LOAD and name.split(".")[0] not in own:
                    yield kind, name
        elif "FAST" in i.opname or i.opname.endswith(("_NAME", "_GLOBAL", "_DEREF", "_CLOSURE")):
            kinds = re.findall(f"{_LOAD}|{_STORE}", i.opname)  # from Python 3.13 one may load or store two
            names = i.argval if isinstance(i.argval, tuple) else (i.argval,)
            for kind, name in zip(kinds, names, strict=False):
                if loaded:
                    yield _LOAD, loaded
                loaded = name if kind == _LOAD else ""
                if kind == _STORE:
                    yield kind, name
    if loaded:
        yield _LOAD, loaded
