"""The values that a row may hold, brought to one form each: a text, a chat of role and content, a class.

What is meant plainly is understood: chats with from and value, content in parts, a chat as JSON, integers and bools as
classes. Anything else raises BadValueError, which names row and column, what is there and what was expected.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from _shared.errors import UserError
from _shared.files import Source
from _shared.lines import ROW

ROLES = {
    "human": "user",
    "ai": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""Names of roles in other formats → the names in chat templates."""

TURNS = "turns with role and content (or from and value)"

Chat = list[dict[str, Any]]


class BadValueError(Exception):
    """An invalid value in a row and column. Can be pickled, as datasets' workers need."""

    def __init__(self, what: str, expected: str, column: str = "", row: int = 0) -> None:
        super().__init__(what, expected, column, row)
        self.what, self.expected, self.column, self.row = what, expected, column, row

    def at(self, column: str, row: int) -> "BadValueError":
        """Return it with the place."""
        return BadValueError(self.what, self.expected, column, row)

    def to_user_error(self, source: Source) -> UserError:
        """Return the one line for the user."""
        return UserError(f"{source.place_of(self.row)}, column {self.column!r}: {self.what}; expected {self.expected}")


def text_of(value: Any) -> str:
    """Return a text; empty for None and for blanks only."""
    if value is None:
        return ""
    if not isinstance(value, str):
        hint = "text (chats are for --messages_column)" if isinstance(value, list | dict) else "text"
        raise BadValueError(describe(value), hint)
    return value if value.strip() else ""


def class_of(value: Any, names: list[str] | None = None) -> str:
    """Return a class as text, empty if there is none; ``names`` are those of a ``ClassLabel``, whose −1 is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if names is not None and isinstance(value, int):
        if value >= len(names):
            raise BadValueError(describe(value), f"a class from 0 to {len(names) - 1}")
        return names[value] if value >= 0 else ""
    if isinstance(value, float) and value.is_integer():  # pandas reads integers with a gap as floats
        value = int(value)
    if not isinstance(value, str | int):
        raise BadValueError(describe(value), "one class: a name, an integer or a bool")
    return str(value).strip()


def chat_of(value: Any) -> Chat:
    """Return turns with ``role``, a text as ``content``, and what else they hold except None; empty for no chat."""
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except ValueError:
            raise BadValueError(describe(value), f"{TURNS}, or JSON of them") from None
    if value is None:
        return []
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:  # as datasets stored lists of records before version 4
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadValueError(describe(value), TURNS)
    return [_turn_of(turn, number) for number, turn in enumerate(value, 1)]


def _turn_of(turn: dict[str, Any], number: int) -> dict[str, Any]:
    turn = {key: value for key, value in turn.items() if value is not None}  # datasets fills absent keys with None
    role_key = "role" if "role" in turn else "from"
    content_key = "content" if "content" in turn or "role" in turn else "value"
    role = turn.get(role_key)
    if not isinstance(role, str) or not role.strip():
        raise BadValueError(f"turn {number} is {describe(turn)}", TURNS)
    content = turn.pop(content_key, None)
    del turn[role_key]
    role = role.strip().lower()
    if turn.get("tool_calls"):
        turn["tool_calls"] = _from_json(turn["tool_calls"])
    return {"role": ROLES.get(role, role), "content": _content_of(content, number), **turn}


def _content_of(content: Any, number: int) -> str:
    """Return the text of a turn; None is an empty one, as beside tool calls."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadValueError(f"turn {number} with the content {describe(content)}", "text, or a list of parts with text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) and kind in ("text", None) else part
        if not isinstance(text, str):
            what = f"a part of type {kind!r}" if kind not in ("text", None) else f"the part {describe(part)}"
            raise BadValueError(f"turn {number} with {what}", "parts of type 'text'")
        texts.append(text)
    return "".join(texts)


def tools_of(value: Any) -> list[Any] | None:
    """Return the tools that a chat may call, as chat templates take them."""
    tools = _from_json(value) if value else None
    if tools is not None and not isinstance(tools, list):
        raise BadValueError(describe(value), "a list of tools")
    return tools or None


def until_last_answer(chat: Chat) -> Chat:
    """Drop the turns after the last assistant turn that says or calls something."""
    num_turns = len(chat)
    while num_turns and not _is_answer(chat[num_turns - 1]):
        num_turns -= 1
    return chat[:num_turns]


def _is_answer(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))


def _from_json(value: Any) -> Any:
    """Read JSON, in which a null is the user's; a value that is read already has those that datasets filled in."""
    if not isinstance(value, str):
        return without_none(value)
    try:
        return json.loads(value)
    except ValueError:
        raise BadValueError(describe(value), "a list, or JSON of one") from None


def without_none(value: Any) -> Any:
    """Drop the keys that datasets filled with None, at any depth."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def user_errors(source: Source) -> Iterator[None]:
    """Turn what is wrong with a value into the one line for the user."""
    try:
        yield
    except BadValueError as error:
        raise error.to_user_error(source) from None


def read(row: dict[str, Any], column: str, form: Callable[[Any], Any]) -> Any:
    """Bring a row's value to its form; an invalid value is raised with its place."""
    try:
        return form(row[column])
    except BadValueError as error:
        raise error.at(column, row[ROW]) from None


def describe(value: Any) -> str:
    """Say what a value is, in a few words.

    Example:
        >>> describe([1, 2, 3]), describe(0.5)
        ('a list of 3 numbers', 'the number 0.5')
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the bool {value}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 40 else value[:39] + '…'!r}"
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(repr, list(value)[:5]))}" if value else "an empty object"
    if isinstance(value, list):
        kinds = {_plural(item) for item in value}
        return f"a list of {len(value)} {kinds.pop() if len(kinds) == 1 else 'values'}" if value else "an empty list"
    return f"a value of type {type(value).__name__}"


def _plural(value: Any) -> str:
    if isinstance(value, bool):
        return "bools"
    kinds = {int: "numbers", float: "numbers", str: "texts", dict: "objects", list: "lists"}
    return kinds.get(type(value), "values")
