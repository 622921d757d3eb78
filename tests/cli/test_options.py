"""A dataclass of options on a command line: flags, switches, groups, and options that exclude each other."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields

import pytest

from madtp.cli.calibrate import Calibrate
from madtp.cli.compress import Compress
from madtp.compress.settings import Settings
from madtp.options import add_options, argument, given, option, parsed, positive, same, unset


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


def test_unset_options_are_none_and_their_help_names_what_holds_then():
    parser = argparse.ArgumentParser(prog="it")
    add_options(parser, unset(Options))
    assert vars(parser.parse_args([])) == dict.fromkeys(("batch_size", "quick", "pretty", "near", "far"))
    assert vars(parser.parse_args(["--no-pretty", "--quick"])) | {"pretty": False, "quick": True} == vars(
        parser.parse_args(["--no-pretty", "--quick"])
    )
    assert "rows per batch (default: 8)" in parser.format_help()


def test_an_option_that_has_to_be_given(capsys):
    @dataclass(kw_only=True)
    class Needed:
        reduction: float = option("how much", MISSING, type=float)
        again: int = same(Base, "batch_size", 2, help="rows")

    parser = argparse.ArgumentParser(prog="it")
    add_options(parser, Needed)
    assert parsed(Needed, parser.parse_args(["--reduction", "0.5"])) == Needed(reduction=0.5, again=2)
    with pytest.raises(SystemExit):
        parser.parse_args(["--again", "1"])
    assert "--reduction" in capsys.readouterr().err and "rows (default: 2)" in parser.format_help()


def test_every_setting_of_training_is_an_option():
    """But `labels`, which tells the two commands apart; `madtp calibrate` spells none of its own anew."""
    settings = {field.name: field for field in fields(Settings)}
    options = {field.name: field for field in fields(Compress) if "help" in field.metadata}
    assert settings.keys() - options.keys() == {"labels"}
    parser = argparse.ArgumentParser()
    add_options(parser, Compress)
    by_name = {action.dest: action for action in parser._actions}
    needed = "--model m --output o --annotations a --dev d --reduction 0.5".split()
    for name, field in settings.items():
        if name in options:
            choices = field.metadata["settings"].get("choices")
            assert field.metadata["help"] in by_name[name].help and by_name[name].choices == choices
            given = name == "reduction"
            assert (getattr(parser.parse_args(needed), name) is not None) == given
    for field in fields(Calibrate):
        if field.name in settings and field.name != "reduction":
            assert field.metadata["settings"] == settings[field.name].metadata["settings"]
