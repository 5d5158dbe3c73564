"""What the user's code has read before and keeps: a number of ranks or of micro-batches, under a name that says so.

Looked at are the attributes of the Trainer and of settings in them, and the globals, closures and attributes of the
functions that compute the loss.
"""

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn

from hf_gradutils._pretended_world import Variable
from hf_gradutils.trainer._no_trace import LIBRARIES
from hf_gradutils.trainer._overrides import definitions, is_transformers

_RANKS = re.compile(
    r"(\w+_)?world(_?size)?|d?dp_size|(n|num)_?(ranks|gpus?|devices|procs?|process(es)?|replicas)"
    r"|(rank|gpu|device|proc|process|replica)_count"
)
_ACCUMULATION = r"(grad(ient)?_?)?accum(ulation)?|grad(ient)?_?acc"
_MICRO_BATCHES = re.compile(
    rf"(n_|num_)?({_ACCUMULATION})(_?(steps?|iters?))?|(n|num)_?micro_?batches|accumulate_grad_batches|gas"
)
"""Whole names: ``lora_ranks``, ``world_model_layers`` and ``micro_batches_seen`` are numbers of something else."""


@dataclass(frozen=True, eq=False, slots=True)
class KeptNumbers:
    """Variables that hold a number of ranks, or ``dist.get_world_size`` under a name of their own, or micro-batches."""

    ranks: tuple[Variable, ...] = ()
    micro_batches: tuple[Variable, ...] = ()

    @property
    def names(self) -> set[str]:
        return {variable.name for variable in (*self.ranks, *self.micro_batches)}

    def without(self, name: str) -> "KeptNumbers":
        return KeptNumbers(*(tuple(v for v in vs if v.name != name) for vs in (self.ranks, self.micro_batches)))


def kept_numbers(trainer: Any) -> KeptNumbers:
    """Find them. Walks through the user's code; objects are held but for the Trainer, which may be a proxy."""
    asks = dist.get_world_size if dist.is_available() else None
    found = list(variables(trainer))
    functions = [variable for variable in found if asks is not None and variable.value is asks]
    ranks = _named(found, _RANKS, trainer.accelerator.num_processes)
    micro_batches = _named(found, _MICRO_BATCHES, trainer.args.gradient_accumulation_steps)
    return KeptNumbers((*functions, *ranks), tuple(micro_batches))


def _named(variables: list[Variable], names: re.Pattern[str], number: int) -> list[Variable]:
    return [
        v
        for v in variables
        if type(v.value) is int and v.value == number > 1 and names.fullmatch(v.name.lower().strip("_"))
    ]


def variables(trainer: Any) -> Iterator[Variable]:
    """Each variable that the user's loss may read."""
    functions, dictionaries = _users_code(trainer)
    for owner in (trainer, *(cls for cls in trainer.__class__.__mro__ if not _is_a_librarys(cls.__module__))):
        for name, value in list(vars(owner).items()):
            yield Variable(name, value, partial(getattr, owner, name, None), partial(setattr, owner, name))
    for entries in (*(_attributes(value) for value in vars(trainer).values()), *dictionaries):
        for name, value in list(entries.items()):
            if type(name) is str:
                yield Variable(name, value, partial(entries.get, name), partial(entries.__setitem__, name))
    for function in functions:
        for name, cell in _closure(function).items():
            get, put = partial(getattr, cell, "cell_contents"), partial(setattr, cell, "cell_contents")
            yield Variable(name, cell.cell_contents, get, put)


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes or entries of settings that the user's Trainer holds."""
    if isinstance(value, dict):
        return value
    is_the_users = isinstance(value, types.SimpleNamespace) or not _is_a_librarys(type(value).__module__)
    return getattr(value, "__dict__", {}) if is_the_users and not isinstance(value, type) else {}


def _users_code(trainer: Any) -> tuple[list[types.FunctionType], list[dict[str, Any]]]:
    """The user's functions that compute a loss, with those that they name; and the dicts of their variables."""
    functions: dict[int, types.FunctionType] = {}
    dictionaries: dict[int, dict[str, Any]] = {}
    todo = [*definitions(trainer, "compute_loss"), *definitions(trainer, "training_step"), trainer.compute_loss_func]
    seen = {id(trainer)}
    while todo:
        code = todo.pop()
        if id(code) in seen:
            continue
        seen.add(id(code))
        if isinstance(code, types.MethodType):
            todo += [code.__func__, code.__self__]
        elif isinstance(code, staticmethod | classmethod):
            todo.append(code.__func__)
        elif isinstance(code, partial):
            dictionaries[id(code.keywords)] = code.keywords
            todo += [code.func, *code.args, *code.keywords.values()]
        elif isinstance(code, types.FunctionType):
            if not _is_a_librarys(code.__globals__.get("__name__")):
                functions[id(code)] = code
                dictionaries[id(code.__globals__)] = code.__globals__
                todo += _named_by(code, trainer)
        elif isinstance(code, types.ModuleType):
            if not _is_a_librarys(code.__name__):
                dictionaries[id(vars(code))] = vars(code)
        elif callable(code) and not isinstance(code, type) and not _is_a_librarys(type(code).__module__):
            dictionaries[id(code)] = getattr(code, "__dict__", {})
            todo.append(_called(code))
    return list(functions.values()), list(dictionaries.values())


def _named_by(function: types.FunctionType, trainer: Any) -> list[Any]:
    """What a function may call: globals, functions of modules, methods of the Trainer, and what it encloses."""
    names, found = _names(function.__code__), [cell.cell_contents for cell in _closure(function).values()]
    owners = [function.__globals__, *(vars(cls) for cls in trainer.__class__.__mro__)]
    owners += [vars(owners[0][n]) for n in names if isinstance(owners[0].get(n), types.ModuleType)]
    return found + [owner[name] for owner in owners for name in names if name in owner]


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


def _closure(function: types.FunctionType) -> dict[str, types.CellType]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    return {name: cell for name, cell in cells if cell != types.CellType()}  # not empty


def _is_a_librarys(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES


def _called(code: Any) -> Any:
    """The function that a call of an object ends in."""
    return type(code).forward if isinstance(code, nn.Module) else type(code).__call__


# ---- Literals ----


def divides_by_literal(trainer: Any, number: int) -> bool:
    """True if the user's loss is divided by this number as a literal, or multiplied by its inverse, as a whole.

    Looked at is what the function itself returns or calls ``loss``; not a sum, of which this may be the average.
    """
    own = [method for method in definitions(trainer, "compute_loss") if not is_transformers(method)]
    return any(_divides(_parsed(function), number) for function in (*own, trainer.compute_loss_func))


def _parsed(function: Any) -> ast.AST:
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)  # of a method
    if not isinstance(function, types.FunctionType):
        function = _called(function)
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source, or a lambda in the middle of a statement
        return ast.Module([], [])


def _divides(function: ast.AST, number: int) -> bool:
    nodes = list(ast.walk(function))
    results: list[ast.AST] = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
    results += [node.body for node in nodes if isinstance(node, ast.Lambda)]
    for node in results:  # grows
        if isinstance(node, ast.IfExp):
            results += [node.body, node.orelse]
        elif isinstance(node, ast.Tuple) and node.elts:
            results.append(node.elts[0])
    names = {"loss", *(result.id for result in results if isinstance(result, ast.Name))}
    for node in nodes:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id in names for t in node.targets):
            results.append(node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id in names:
            results.append(ast.BinOp(node.target, node.op, node.value))
    return any(_is_divided(node, number) for node in results)


def _is_divided(node: ast.AST, number: int) -> bool:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult | ast.Div):
        return False
    sides = (node.left, node.right)
    if any(isinstance(side, ast.BinOp) and isinstance(side.op, ast.Add | ast.Sub) for side in sides):
        return False
    if isinstance(node.op, ast.Div):
        return _is_literal(node.right, number) or _is_divided(node.left, number)
    return any(_is_literal(side, 1 / number) or _is_divided(side, number) for side in sides)


def _is_literal(node: ast.AST, number: float) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value == number
