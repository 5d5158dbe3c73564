"""The work of a block: the plain values that its body reads.

In ``for k in names: if not made(k): with FirstRankPerNode(): make(k)`` a late rank skips what is made already: its
first passage is another rank's second. That both read ``k='b'`` says that these belong together.
"""

import enum
import functools
import hashlib
import inspect
import numbers
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from types import FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

from hf_gradutils.coordination.body import Reads, reads_of_body

MAX_ITEMS = 32
"""A container or an object with more entries is a state, not the work of one block."""

MAX_DEPTH = 2
MAX_VALUE_CHARS = 1000
"""Of longer texts and bytes the begin and the length count."""

MAX_TEXT_CHARS = 100
MAX_INTEGER = 10**12
"""Larger ones are times in nanoseconds, addresses or hashes, which differ between ranks."""

MAX_FLOAT_CHARS = 8
"""Floats with more digits are measured, not written by a user."""

_LEFT_OUT = re.compile(
    r"((global|local|node|world|my|dp|tp|pp|cp|ep)_)?rank|(local_)?process_index|is_(main|first|local|master).*"
    r"|device(_id|_map)?|gpu(_id)?|pid|hostname|attempt|retry|retries|num_retries"  # these differ between ranks
    r"|(.*_)?(tokens?|secrets?|passwords?|passwd|credentials?|auth|(api|access|secret|private)_?keys?)",  # not for logs
    re.IGNORECASE,
)
"""Names of variables, attributes and keys that do not count."""

_CONTAINERS = (dict, list, tuple, set, frozenset)
_NUMBER = re.compile(r"[-+.e\d]+|True|False")

NUM_OWN_REFERENCES = 3
"""To a frame's copy of its variables: the frame's, this module's and that of the call that counts them."""


class Work(NamedTuple):
    """The values that one passage through a block works on."""

    text: str
    """For messages: ``k='b'`` for the variables of ``for`` loops, of others the names. Empty if there are no values."""

    digest: str
    """Equal on ranks that read equal values."""

    is_of_loop: bool = False
    """True if the values are those of a ``for`` loop around the block."""

    is_certain: bool = False
    """True if one of them is not just a number, which may count what is left to do."""


NO_WORK = Work("", "0")


class _Group(enum.IntEnum):
    """Kinds of variables, from the most telling on: the first that there are count, and none below."""

    OF_FOR = 1
    """Variables that a ``for`` loop around the block sets."""

    OTHER = 2
    """Variables that a ``while`` loop sets, parameters, and plain values of the function."""

    OBJECT = 3
    """Objects, which may also keep results."""

    GLOBAL = 4


def work_of_body(frame: FrameType, callers: Sequence[str] = ()) -> Work:
    """The work of the ``with`` statement that ``frame`` is about to enter.

    ``callers``: Places that count as well.

    Counted are text, numbers, paths, functions, data sets (by their fingerprints), and containers and objects of these,
    in variables and attributes that the body reads: those that a ``for`` loop around it sets, else others that are new
    each time, else objects. Others collect results, which differ between ranks that skip.

    Collectives: none.
    """
    is_function = bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)
    reads = reads_of_body(frame.f_code, frame.f_lasti)
    if is_function and reads.has_locals:
        # Up to Python 3.12, to look at a function's variables writes them into what locals() has returned there.
        return _work({}, callers)
    snapshot = frame.f_locals
    try:
        return _work(_group_values(reads, snapshot, frame.f_globals), callers)
    except Exception:  # values of a user may raise anything where they are looked at
        return NO_WORK
    finally:
        # Up to Python 3.12 a frame keeps that copy of its variables, which would keep alive what is deleted there.
        if is_function and isinstance(snapshot, dict) and sys.getrefcount(snapshot) <= NUM_OWN_REFERENCES:
            snapshot.clear()


def _group_values(
    reads: Reads, variables: Mapping[str, Any], of_module: Mapping[str, Any]
) -> dict[_Group, dict[str, Any]]:
    groups: dict[_Group, dict[str, Any]] = {group: {} for group in _Group}
    for chain in sorted(reads.chains):
        scope = variables if chain[0] in variables else of_module
        if chain[0] in scope:  # else a builtin, or not set yet
            name, value = _follow(chain, scope[chain[0]])
            if group := _group_of(chain[0], value, reads, variables, of_module):
                groups[group][name] = value
    return groups


def _group_of(
    name: str, value: Any, reads: Reads, variables: Mapping[str, Any], of_module: Mapping[str, Any]
) -> _Group | None:
    """The group in which a value counts; None for one that does not."""
    is_parameter, is_local = name in reads.parameters, name in variables
    if name in reads.set_by_for:
        return _Group.OF_FOR
    if _is_a(value, bool):  # is_first of another block, for one
        return _Group.OTHER if is_parameter else None
    if name in reads.set_in_loop:
        return _Group.OF_FOR if reads.set_by_for else _Group.OTHER
    if _is_container(value) or _is_function(value):
        return _Group.OTHER if is_parameter else None
    if not _is_scalar(value):
        return _Group.OBJECT if is_local else None
    if not is_local:
        return _Group.GLOBAL
    return None if variables is of_module else _Group.OTHER  # in a script, a constant


def work_of_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Work:
    """The work of one call of a decorated function: its arguments, as in :func:`work_of_body`."""
    try:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        telling = {name: value for name, value in arguments.items() if _is_scalar(value) or _is_container(value)}
        return _work({_Group.OTHER: telling, _Group.OBJECT: arguments})
    except Exception:  # of the user's values; or the call is wrong, and will say so itself
        return NO_WORK


def _work(groups: Mapping[_Group, Mapping[str, Any]], callers: Sequence[str] = ()) -> Work:
    described = ((group, _describe_all(groups[group])) for group in sorted(groups))
    group, parts = next(((group, parts) for group, parts in described if parts), (None, []))
    if not parts and not callers:
        return NO_WORK
    names = [f"its {part.partition('=')[0]}" for part in parts] or [f"what is called in {callers[0]}"]
    is_of_loop = group is _Group.OF_FOR
    text, whole = ", ".join(parts if is_of_loop else names), "\n".join([*callers, *parts])
    return Work(
        text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]}…",
        hashlib.sha256(whole.encode(errors="surrogatepass")).hexdigest()[:16],
        is_of_loop=is_of_loop,
        is_certain=any(not _NUMBER.fullmatch(part.partition("=")[2]) for part in parts),
    )


def _follow(chain: tuple[str, ...], value: Any) -> tuple[str, Any]:
    """The value of ``a.b.c`` as far as it lies in attributes of instances and modules, and the name that far."""
    name = chain[0]
    for attribute in chain[1:]:
        attributes = _attributes(value)
        if _is_scalar(value) or attribute not in attributes:  # a method or a property
            break
        name, value = f"{name}.{attribute}", attributes[attribute]
    return name, value


def _describe_all(variables: Mapping[str, Any], depth: int = 0) -> list[str]:
    counted = {name: value for name, value in variables.items() if not _LEFT_OUT.fullmatch(name.rpartition(".")[2])}
    described = ((name, _describe(value, depth)) for name, value in sorted(counted.items()))
    return [f"{name}={text}" for name, text in described if text is not None]


def _is_a(value: Any, *kinds: type) -> bool:
    """``isinstance`` that asks the type alone: a proxy would load what it stands for."""
    return issubclass(type(value), kinds)


def _is_scalar(value: Any) -> bool:
    is_plain = value is None or _is_a(value, str, bytes, numbers.Number, PurePath, enum.Enum)
    return is_plain or _is_function(value) or _is_a(_attributes(value).get("_fingerprint"), str)


def _is_function(value: Any) -> bool:
    return _is_a(value, FunctionType, functools.partial)


def _is_container(value: Any) -> bool:
    return _is_a(value, *_CONTAINERS)


def _attributes(value: Any) -> Mapping[str, Any]:
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return {} if _is_a(value, type) or not _is_a(attributes, dict) else attributes


def _held_by(function: FunctionType) -> Mapping[str, Any]:
    try:
        return inspect.getclosurevars(function).nonlocals
    except ValueError:  # one is not set yet
        return {}


def _describe(value: Any, depth: int = 0) -> str | None:
    """A text that is equal for equal values, also in another process; None for what has none."""
    if _is_a(value, enum.Enum):
        return f"{type(value).__name__}.{value._name_}"
    if _is_a(value, numbers.Number):
        return _describe_number(value)
    for kind in (str, bytes):
        if _is_a(value, kind):
            length = kind.__len__(value)
            begin = kind.__getitem__(value, slice(MAX_VALUE_CHARS))
            return f"{begin!r}{f' of {length}' if length > MAX_VALUE_CHARS else ''}"
    if _is_a(value, PurePath):
        return repr(str(value))
    if depth > MAX_DEPTH or _is_a(value, type, ModuleType):
        return None
    attributes = _attributes(value)
    if _is_a(fingerprint := attributes.get("_fingerprint"), str):
        return f"data {fingerprint}"
    if _is_a(value, functools.partial):
        return _describe((value.func, value.args, value.keywords), depth)
    if _is_a(value, FunctionType):
        held = _held_by(value)
        return f"{value.__module__}.{value.__qualname__}({', '.join(_describe_all(held, depth + 1))})"
    if _is_container(value):
        return _describe_container(value, depth)
    entries = _describe_all(attributes, depth + 1) if len(attributes) <= MAX_ITEMS else []
    return f"{type(value).__name__}({', '.join(entries)})" if entries else None


def _describe_number(value: Any) -> str | None:
    if _is_a(value, bool):
        return repr(value)
    if _is_a(value, numbers.Integral):
        return str(int(value)) if abs(int(value)) < MAX_INTEGER else None
    if _is_a(value, float):  # numpy's, too
        return text if len(text := repr(float(value))) <= MAX_FLOAT_CHARS else None
    return None


def _describe_container(value: Any, depth: int) -> str | None:
    kind = next(kind for kind in _CONTAINERS if _is_a(value, kind))
    if kind.__len__(value) > MAX_ITEMS:
        return None
    if kind is dict:
        named = {str(_describe(key, MAX_DEPTH)).strip("'"): entry for key, entry in dict.items(value)}
        return f"{{{', '.join(_describe_all(named, depth + 1))}}}"
    texts = [str(_describe(item, depth + 1)) for item in kind.__iter__(value)]
    return f"[{', '.join(texts if kind in (tuple, list) else sorted(texts))}]"
