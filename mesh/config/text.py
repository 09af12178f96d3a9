"""YAML and command-line values as text, and the one reader that gives text a type.

A scalar without quotes is `Text`: it has no type until a key's annotation, or the field of a task,
gives it one. YAML 1.1 would read `no` as a false, 010 as 8, 1:30 as 90, and 2024-01-02 as a date.
What stands in quotes is a `str`, whatever it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml  # type: ignore[import-untyped]


class Text(str):
    """A value as it was written, without a type."""

    def __repr__(self) -> str:
        return str(self)


class TextLoader(yaml.BaseLoader):
    """Leave every YAML scalar as the text it is."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        return Text(node.value) if node.style is None else str(node.value)


class TextDumper(yaml.SafeDumper):
    """Writes Text and `str` so that `TextLoader` gives them back."""


def _represent(dumper: Any, text: str) -> yaml.Node:
    """Text that can be read as more than a text stands bare, and such a `str` in quotes."""
    if not is_ambiguous(text):
        return dumper.represent_scalar("tag:yaml.org,2002:str", str(text))
    if not isinstance(text, Text):
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")
    tag = dumper.resolve(yaml.ScalarNode, str(text), (True, False))  # else it would be quoted
    return dumper.represent_scalar(tag, str(text))


def dump_text(values: Mapping[str, Any]) -> str:
    """YAML of a mapping, from which `load_yaml` gives equal values, Text and `str` as they were."""
    return str(
        yaml.dump(
            values, Dumper=TextDumper, default_flow_style=False, allow_unicode=True, sort_keys=False
        )
    )


TextDumper.add_representer(Text, _represent)
TextDumper.add_representer(str, _represent)


def load_yaml(text: str) -> tuple[Any, list[str]]:
    """The content of a YAML document, and a line for each key that it gives twice.

    Raises yaml.YAMLError.
    """
    loader = TextLoader(text)
    node = loader.get_single_node()
    if node is None:
        return None, []
    lines: dict[str, int] = {}
    repeated = []
    for name, line in keys_of(node, "", lines):
        repeated.append(f"{name} is given twice, in lines {lines[name]} and {line}; keep one")
    return loader.construct_document(node), repeated


def keys_of(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Iterator[tuple[str, int]]:
    """The dotted name and the line of every key that is in `lines`, where the others are noted;
    `a.b: 1` and `a: {b: 1}` are one key. A repeated block is not looked into.
    """
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from keys_of(item, f"{prefix.removesuffix('.')}[{index}].", lines)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            yield name, line
        else:
            lines[name] = line
            yield from keys_of(value, f"{name}.", lines)


def from_word(value: Any) -> Any:
    """A value of the command line, which may be a list, a mapping or a text in quotes as YAML
    writes them. ValueError where a key is given twice.
    """
    if not isinstance(value, Text) or value[:1] not in ("[", "{", "'", '"'):
        return value
    try:
        content, repeated = load_yaml(value)
    except yaml.YAMLError:
        return value
    if repeated:
        raise ValueError(repeated[0])
    return content


TRUE, FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
ORDER = (NoneType, int, float, bool)
"""In which order a union's types are tried on text; then containers, and `str` last."""


def is_ambiguous(text: str) -> bool:
    """True for text that some type other than `str` would take."""
    return any(_takes(Text(text), kind) for kind in ORDER)


def _takes(text: Text, kind: type) -> bool:
    try:
        _text_as(text, kind)
    except ValueError:
        return False
    return True


def value_as(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` has it: Text is read, and so is Text inside lists and mappings;
    any other value has to be of the type. ValueError where it cannot be.

    Integers and floats are written as in Python: 1_000, 0x10 and 1e-6, and not 010 or 1:30.
    """
    origin, args = get_origin(hint), get_args(hint)
    kind = origin or hint
    if kind is Literal:
        return _choice(value, args)
    if kind in (Union, UnionType):
        return _first(value, sorted(args, key=_rank))
    if not isinstance(kind, type) or kind in (Any, object):
        return _untyped(value)
    if issubclass(kind, Mapping):
        of_key, of_value = args or (Any, Any)
        items = _checked(value, kind).items()
        return {value_as(key, of_key): value_as(item, of_value) for key, item in items}
    if issubclass(kind, Collection) and not issubclass(kind, str | bytes):
        return _collection(value, kind, args)
    return _text_as(value, kind) if isinstance(value, Text) else _checked(value, kind)


def _choice(value: Any, choices: Sequence[Any]) -> Any:
    for choice in choices:
        try:
            if value_as(value, type(choice)) == choice:
                return choice
        except ValueError:
            continue
    raise ValueError(f"{value!r} is none of {choices}")


def _first(value: Any, kinds: Sequence[Any]) -> Any:
    """The first reading that there is. Beside `str`, only true and false are a bool."""
    word = isinstance(value, Text) and str in kinds and value not in ("true", "false", "null")
    for kind in kinds:
        if word and kind in (NoneType, bool):
            continue
        try:
            return value_as(value, kind)
        except ValueError:
            continue
    raise ValueError(f"{value!r} is none of {kinds}")


def _rank(kind: Any) -> int:
    if kind in ORDER:
        return ORDER.index(kind)
    return len(ORDER) + (kind is str)


def _untyped(value: Any) -> Any:
    """A value for which no type is declared."""
    if isinstance(value, list):
        return [_untyped(item) for item in value]
    if isinstance(value, dict):
        return {_untyped(key): _untyped(item) for key, item in value.items()}
    return _first(value, (*ORDER, str)) if isinstance(value, Text) else value


def _collection(value: Any, kind: type, args: Sequence[Any]) -> Any:
    """A list, tuple or set, as the kind says; a list for the abstract kinds."""
    if isinstance(value, str) or not isinstance(value, (list, kind)):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    items: list[Any] = list(value)  # type: ignore[call-overload]
    if kind is tuple and args and args[-1] is not Ellipsis:
        return tuple(value_as(item, hint) for item, hint in zip(items, args, strict=True))
    found = [value_as(item, args[0] if args else Any) for item in items]
    makes: Any = kind if kind in (tuple, set, frozenset) else type(value)
    return makes(found)


def _text_as(text: Text, kind: type) -> Any:
    """Text as a scalar."""
    word = text.lower()
    if kind is str:
        return str(text)
    if kind is bool and word in (*TRUE, *FALSE):
        return word in TRUE
    if kind is NoneType and word in ("null", "~"):
        return None
    if kind is int and text.strip() == text:
        return int(text, 0)
    if kind is float and text.strip() == text and not re.match(r"[+-]?0[\d_]", text):
        return float(word.replace(".inf", "inf").replace(".nan", "nan"))
    raise ValueError(f"{text!r} is no {kind.__name__}")


def _checked(value: Any, kind: type) -> Any:
    """A value that has its type already; a bool is an int to Python, not to a user."""
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def mismatch(value: Any, hint: Any) -> str:
    """The end of a message about a value that `value_as` refuses."""
    wanted = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    if hint is str and isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "a mapping"
        return f"cannot be read as a text: it is {kind}; write quotes, as in 'KEY=\"{{a}} [b]\"'"
    if isinstance(value, Text | list | dict):
        return f"cannot be read as {wanted}; give one, with numbers as Python writes them"
    return f"expected {wanted}, got {type(value).__name__}"
