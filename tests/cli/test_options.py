"""A dataclass of options on a command line: flags, switches, groups, and options that exclude each other."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from madtp.options import add_options, argument, given, option, parsed, positive


@dataclass(kw_only=True)
class Base:
    paths: Sequence[str] = argument("where", nargs="*")
    batch_size: int = option("rows per batch", 8, type=positive, metavar="N")
    plain: int = 3


@dataclass(kw_only=True)
class Options(Base):
    quick: bool = option("hurry", False, group="how")
    pretty: bool = option("no frills", True, flag="--no-pretty", group="how")
    near: float | None = option("near", None, type=float, exclusive="place")
    far: float | None = option("far", None, type=float, exclusive="place")


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="it")
    add_options(parser, Options)
    return parser


def test_defaults_are_those_of_the_dataclass(parser):
    assert parsed(Options, parser.parse_args([])) == Options(paths=[])


def test_options_reach_their_fields(parser):
    arguments = ["a", "b", "--batch-size", "2", "--quick", "--no-pretty", "--far", "0.5"]
    options = parsed(Options, parser.parse_args(arguments))
    assert options == Options(paths=["a", "b"], batch_size=2, quick=True, pretty=False, far=0.5)
    assert given(options, ("near", "far", "batch_size")) == "--far, --batch-size"


@pytest.mark.parametrize("wrong", [["--near", "1", "--far", "2"], ["--batch-size", "0"], ["--plain", "4"]])
def test_what_is_wrong_is_refused(parser, wrong, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_the_help_has_groups_and_defaults(parser):
    text = parser.format_help()
    assert "rows per batch (default: 8)" in text and "how:" in text and "--no-pretty" in text
