"""Conversations as they are found, in the one form that chat templates are given.

A message has `role` (system, user, assistant or tool) and `content`, and where they were given `tool_calls` (in the
form of OpenAI, arguments as an object), the assistant's thoughts under the name that they came with, `name` and
`tool_call_id`; `train: False` marks an answer that is shown but not learned. The definitions of tools that belong to
the whole conversation stand in the first message, as `tools`.
"""

from __future__ import annotations

import json
from typing import Any

from uniattn_cli.errors import RowError

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
# What a turn of these roles says is a call, as JSON.
CALLING_ROLES = ("function_call", "tool_call")
# What the thoughts before an answer are called, in data and in templates.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Numbers or truth values that say whether an answer is learned.
LEARNED = ("weight", "train", "training", "loss")
CONTENT = ("content", "value")
MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios")
TEXT_PARTS = (None, "text", "input_text", "output_text")


def empty(value: Any) -> bool:
    """Whether a field holds nothing: tables have every field in every row."""
    return value is None or value in ("", [], {})


def conversation(value: Any, where: str, column: str, unused: set[str]) -> list[Message]:
    """Checks a conversation, in the form of OpenAI (role, content) or of ShareGPT (from, value).

    Args:
        value: the list of messages, or its JSON.
        where: the row, for messages to the user.
        column: where in the row it stands.
        unused: gets what the messages hold that is not used.

    Raises:
        RowError: it cannot be used.
    """
    if isinstance(value, str):  # a table of text holds it as JSON
        value = _parsed(value) or value
    if not isinstance(value, list) or not value:
        fault = "is null" if value is None else "must be a list of messages"
        raise RowError(f"{where}: column '{column}' {fault}")
    found: list[Message] = []
    tools: list[dict] = []
    for number, message in enumerate(value, 1):
        here = f"{where}, message {number} of '{column}'"
        if not isinstance(message, dict):
            raise RowError(f"{here} must have role and content (or from and value)")
        rest = {name: field for name, field in message.items() if not empty(field) or name in CONTENT}
        tools = tools or definitions(rest.pop("tools", None), here)
        found.append(_message(rest, here))
        unused.update(f"{name} of messages" for name in rest if name != "id")
    return with_tools(found, tools)


def with_tools(messages: list[Message], tools: list[dict]) -> list[Message]:
    """A conversation with the definitions of its tools; those of its own go before."""
    if not tools or not messages or "tools" in messages[0]:
        return messages
    return [{**messages[0], "tools": tools}, *messages[1:]]


def definitions(value: Any, here: str) -> list[dict]:
    """Definitions of tools in the form of OpenAI, from a list or from its JSON.

    Raises:
        RowError: they are neither.
    """
    if _nothing(value):
        return []
    tools = _parsed(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{here}: tools must be a list of definitions, each an object")
    return [tool if "function" in tool or "name" not in tool else _function(tool) for tool in tools]


def _function(content: dict) -> dict:
    return {"type": "function", "function": content}


def _message(rest: dict[str, Any], here: str) -> Message:
    """The message; what is used of it is taken out of `rest`."""
    given = _first(rest, "role", "from")
    named = given.strip().lower() if isinstance(given, str) else None
    if named is None or named not in ROLES:
        raise RowError(f"{here}: unknown role {given!r}; known: {', '.join(ROLES)}")
    media = [name for name in MEDIA if name in rest]
    if media:
        raise RowError(f"{here} has {media[0]}; only text is supported")
    message: Message = {"role": ROLES[named], "content": _first(rest, *CONTENT)}
    content, thoughts = _text(message["content"], here)
    if message["role"] == "assistant":
        message |= _answer(named, content, thoughts, rest, here)
    else:
        message["content"] = content
        for name in LEARNED:  # only answers are learned, so that this asks for nothing
            if rest.get(name) in (0, 1) and not rest[name]:
                del rest[name]
    if message["content"] is None:
        raise RowError(f"{here} has no text content; only text is supported")
    return message | {name: str(rest.pop(name)) for name in ("name", "tool_call_id") if name in rest}


def _answer(role: str, content: str | None, thoughts: Message, rest: dict[str, Any], here: str) -> Message:
    """What belongs to a turn of the assistant; what is used of it is taken out of `rest`."""
    calls = _first(rest, "tool_calls", "function_call")
    if role in CALLING_ROLES:
        content, calls = None, content
    given = thoughts or {name: rest[name] for name in THOUGHTS if isinstance(rest.get(name), str)}
    answer = dict(list(given.items())[:1])
    for name in THOUGHTS:  # some give them twice
        if rest.get(name) in answer.values():
            del rest[name]
    if not _nothing(calls):
        answer["tool_calls"] = _calls(calls, here)
    # Templates join it with other text, so that nothing said is no characters.
    answer["content"] = "" if content is None and answer else content
    if not _learned(rest):
        answer["train"] = False
    elif content is not None and not content.strip() and len(answer) == 1:
        raise RowError(f"{here} is an empty answer")
    return answer


def _text(content: Any, here: str) -> tuple[str | None, Message]:
    """Text of a content, which may come in parts, and the thoughts among them; None where there is none."""
    if content is None or isinstance(content, str):
        return content, {}
    if not isinstance(content, list):
        raise RowError(f"{here}: its content is {type(content).__name__}, not text; only text is supported")
    said: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = "text" if isinstance(part, str) else part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part if isinstance(part, str) else None
        if isinstance(part, dict) and kind in THOUGHTS:
            text = _first(dict(part), kind, "text")
        elif isinstance(part, dict) and kind in TEXT_PARTS:
            text = part.get("text")
        if not isinstance(text, str):
            raise RowError(f"{here} has a part of type {kind!r} without text; only text is supported")
        (thoughts if kind in THOUGHTS else said).append(text)
    return "".join(said) if said else None, {THOUGHTS[0]: "".join(thoughts)} if thoughts else {}


def _learned(rest: dict[str, Any]) -> bool:
    """Whether an answer is learned; a weight between is none that can be used, and is left in `rest`."""
    said = [bool(rest.pop(name)) for name in LEARNED if rest.get(name) in (0, 1)]
    return all(said)


def _calls(value: Any, here: str) -> list[dict]:
    """Calls of tools in the form of OpenAI, with the arguments as an object, which is what templates expect."""
    calls = _parsed(value) if isinstance(value, str) else value
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowError(f"{here} has a tool call without the name of a function")
        arguments = inner.get("arguments", inner.get("parameters"))
        if isinstance(arguments, str) and arguments.strip():
            arguments = _parsed(arguments)
        elif empty(arguments) or isinstance(arguments, str):
            arguments = {}
        if not isinstance(arguments, dict):
            raise RowError(f"{here} has a tool call whose arguments are not a JSON object")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append(named | _function({"name": inner["name"], "arguments": arguments}))
    return found


def _nothing(value: Any) -> bool:
    """Whether a field that a table of text holds as JSON holds nothing."""
    return empty(value) or (isinstance(value, str) and value.strip() in ("", "null", "[]", "{}"))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _first(rest: dict[str, Any], *names: str) -> Any:
    """The first of these fields that is there; all of them are taken out."""
    values = [rest.pop(name, None) for name in names]
    return next((value for value in values if value is not None), None)
