"""Command-line options declared as dataclass fields; argparse is set up from their metadata."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

__all__ = [
    "UsageError", "above_zero", "add_options", "argument", "given", "help_of", "not_negative", "not_negative_int", "option", "parsed",
    "positive", "same", "share", "share_or_none", "unset",
]  # fmt: skip


class UsageError(ValueError):
    """Options that exclude each other; the command ends like one with an unknown option."""


def _number(name: str, kind: type, fits: Callable[[float], bool], expected: str) -> Callable[[str], Any]:
    """An argparse type: a number of a kind that ``fits``; argparse shows ``name`` where a text is no such number."""

    def parse(text: str) -> Any:
        if not fits(number := kind(text)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return number

    parse.__name__ = name
    return parse


# Types of numbers for argparse.
positive = _number("positive", int, lambda x: x >= 1, "at least 1")  # whole numbers
not_negative_int = _number("not_negative_int", int, lambda x: x >= 0, "a number >= 0")  # whole numbers
not_negative = _number("not_negative", float, lambda x: 0 <= x < math.inf, "a number >= 0")  # finite ones
above_zero = _number("above_zero", float, lambda x: 0 < x < math.inf, "a number > 0")  # finite ones
share = _number("share", float, lambda x: 0 < x < 1, "a share between 0 and 1")  # both excluded
share_or_none = _number("share_or_none", float, lambda x: 0 <= x < 1, "a share of at least 0 and below 1")  # none is 0


def option(help: str, default: Any = None, *, group: str = "", exclusive: str = "", flag: str = "", **settings) -> Any:
    """A dataclass field that is an option; ``batch_size`` becomes ``--batch-size``.

    Args:
        help: text; a default is appended, unless it is None, empty or a boolean.
        default: value of the field; a boolean makes a switch, ``dataclasses.MISSING`` an option that has to be given.
        group: section of the help.
        exclusive: options with the same value here exclude each other.
        flag: name of the option, if not that of the field.
        settings: arguments of :meth:`argparse.ArgumentParser.add_argument`: type, choices, metavar, nargs, required,
            ...
    """
    metadata = {"help": help, "group": group, "exclusive": exclusive, "flag": flag, "settings": settings}
    return dataclasses.field(default=default, metadata=metadata)


def same(kind: type, name: str, default: Any = ..., *, help: str = "", group: str = "") -> Any:
    """The option that a field of another dataclass is, but for what is given here."""
    field = kind.__dataclass_fields__[name]
    metadata = {**field.metadata, "help": help or field.metadata["help"], "group": group or field.metadata["group"]}
    return dataclasses.field(default=field.default if default is ... else default, metadata=metadata)


def unset(kind: type) -> type:
    """A dataclass with the options of another one, each None unless it is given; the help names the other's default.
    Positional arguments are left out."""
    fields: list = []
    for field in filter(_is_option, dataclasses.fields(kind)):
        if field.metadata["settings"].get("positional"):
            continue
        settings = {"action": _switch(field.default), **field.metadata["settings"]}
        metadata = {**field.metadata, "settings": settings, "help": help_of(field)}
        fields.append((field.name, field.type, dataclasses.field(default=None, metadata=metadata)))
    return dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)


def argument(help: str, **settings) -> Any:
    """A dataclass field that is a positional argument; ``settings`` as in :func:`option`."""
    return option(help, (), **settings, positional=True)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add the options of a dataclass to a parser."""
    groups: dict[tuple[str, ...], Any] = {("",): parser}
    for field in filter(_is_option, dataclasses.fields(kind)):
        title, exclusive = field.metadata["group"], field.metadata["exclusive"]
        if (title,) not in groups:
            groups[title,] = parser.add_argument_group(title)
        target = groups[title,]
        if exclusive:
            if (title, exclusive) not in groups:
                groups[title, exclusive] = target.add_mutually_exclusive_group()
            target = groups[title, exclusive]
        _add(target, field)


def _is_option(field: dataclasses.Field) -> bool:
    return "help" in field.metadata


def _switch(default: Any) -> str:
    """argparse's action for a field with this default."""
    return "store" if not isinstance(default, bool) else "store_false" if default else "store_true"


def help_of(field: dataclasses.Field) -> str:
    """The text, and the default where that says something."""
    default, text = field.default, field.metadata["help"]
    if default is None or default is dataclasses.MISSING or default == () or isinstance(default, bool):
        return text
    return f"{text} (default: {f'{default:g}' if isinstance(default, float) else default})"


def _add(target, field: dataclasses.Field) -> None:
    settings, default = dict(field.metadata["settings"]), field.default
    if settings.pop("positional", False):
        target.add_argument(field.name, help=help_of(field), **settings)
        return
    flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
    settings = {"action": _switch(default), "required": default is dataclasses.MISSING, **settings}
    default = None if default is dataclasses.MISSING else default
    target.add_argument(flag, dest=field.name, default=default, help=help_of(field), **settings)


def parsed(kind: type, namespace: argparse.Namespace) -> Any:
    """An instance of the dataclass, filled from the command line."""
    values = vars(namespace)
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})


def given(options: Any, names: Iterable[str]) -> str:
    """Those options that were given, such as "--top-p, --seed"; empty if none was."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None)
