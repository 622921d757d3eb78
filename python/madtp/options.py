"""Command-line options declared as dataclass fields; argparse is set up from their metadata."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

__all__ = ["UsageError", "add_options", "argument", "given", "option", "parsed", "positive"]


class UsageError(ValueError):
    """Options that exclude each other; the command ends like one with an unknown option."""


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def option(help: str, default: Any = None, *, group: str = "", exclusive: str = "", flag: str = "", **settings) -> Any:
    """A dataclass field that is an option; ``batch_size`` becomes ``--batch-size``.

    Args:
        help: text; a default that is neither None nor a boolean is appended.
        default: value of the field; a boolean makes a switch.
        group: section of the help.
        exclusive: options with the same value here exclude each other.
        flag: name of the option, if not that of the field.
        settings: arguments of :meth:`argparse.ArgumentParser.add_argument`: type, choices, metavar, nargs, required,
            ...
    """
    metadata = {"help": help, "group": group, "exclusive": exclusive, "flag": flag, "settings": settings}
    return dataclasses.field(default=default, metadata=metadata)


def argument(help: str, **settings) -> Any:
    """A dataclass field that is a positional argument; ``settings`` as in :func:`option`."""
    return option(help, (), **settings, positional=True)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add the options of a dataclass to a parser."""
    groups: dict[tuple[str, ...], Any] = {("",): parser}
    for field in dataclasses.fields(kind):
        if "help" not in field.metadata:
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
    """An instance of the dataclass, filled from the command line."""
    values = vars(namespace)
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})


def given(options: Any, names: Iterable[str]) -> str:
    """Those options that were given, such as "--top-p, --seed"; empty if none was."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None)
