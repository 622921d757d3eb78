"""Options of commands as dataclasses: a field is an option, and its metadata is what argparse is told about it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

__all__ = ["UsageError", "add_options", "argument", "given", "option", "parsed", "positive"]


class UsageError(ValueError):
    """Options that do not go together; the command ends as with an option that does not exist."""


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def option(help: str, default: Any = None, *, group: str = "", exclusive: str = "", flag: str = "", **settings) -> Any:
    """A dataclass field that is an option; its name with dashes is the option's.

    Args:
        help: text; a default that is neither None nor a boolean is added to it.
        default: of the field. A boolean makes a switch.
        group: title of the group that the help shows it in.
        exclusive: at most one of the options with this name may be given.
        flag: the option's name, if it is not the field's.
        settings: of :meth:`argparse.ArgumentParser.add_argument`: type, choices, metavar, nargs, required, ...
    """
    metadata = {"help": help, "group": group, "exclusive": exclusive, "flag": flag, "settings": settings}
    return dataclasses.field(default=default, metadata=metadata)


def argument(help: str, **settings) -> Any:
    """A dataclass field that is a positional argument; ``settings`` as in :func:`option`."""
    return option(help, (), **settings, positional=True)


def add_options(parser: argparse.ArgumentParser, kind: type, only: Iterable[str] | None = None) -> None:
    """Add the options that a dataclass describes to a parser; with ``only``, the fields with these names."""
    groups: dict[tuple[str, ...], Any] = {("",): parser}
    for field in dataclasses.fields(kind):
        if "help" not in field.metadata or (only is not None and field.name not in only):
            continue
        title, exclusive = field.metadata["group"], field.metadata["exclusive"]
        if (title,) not in groups:
            groups[title,] = parser.add_argument_group(title)
        target = groups[title,]
        if exclusive:
            if (title, exclusive) not in groups:
                groups[title, exclusive] = target.add_mutually_exclusive_group()
            target = groups[title, exclusive]
        _add(target, field)


def _add(target, field: dataclasses.Field) -> None:
    settings, default, text = dict(field.metadata["settings"]), field.default, field.metadata["help"]
    if settings.pop("positional", False):
        target.add_argument(field.name, help=text, **settings)
        return
    flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
    if isinstance(default, bool):
        settings["action"] = "store_false" if default else "store_true"
    elif default is not None:
        text += f" (default: {default})"
    target.add_argument(flag, dest=field.name, default=default, help=text, **settings)


def parsed(kind: type, namespace: argparse.Namespace) -> Any:
    """The dataclass with what was given on the command line."""
    values = vars(namespace)
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})


def given(options: Any, names: Iterable[str]) -> str:
    """Those of the options that were given, as they are written: "--top-p, --seed"; empty if none was."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None)
