"""Every `madtp` command that README, docs and help texts show is one: the command's own parser takes it."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from madtp import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """Command lines of the fenced blocks of a page, without prompts, comments and what a pipe or a file does with them."""
    for block in re.findall(r"^ *```(?:sh|console|bash|)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = (
                shlex.split(re.sub(r"^\$ ", "", line.strip()), comments=True)
                if re.search(r"(^|\s)madtp\s", line)
                else []
            )
            places = [-1, *(n for n, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words)]
            for begin, end in zip(places, places[1:]):
                part = words[begin + 1 : end]
                if part[:1] == ["torchrun"] and "-m" in part:
                    part = part[part.index("-m") + 1 :]
                if part[:1] == ["madtp"]:
                    yield part[1:]


def every_command():
    return [
        pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")
        for page in PAGES
        for words in commands(page.read_text(encoding="utf-8"))
        if words[-1] != "..."  # an abbreviation
    ]


def help_texts():
    """What follows the options of the help of `madtp` and of each command."""
    top = cli.parser()
    subcommands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction)).choices
    return {"madtp": top.epilog, **{name: parser.epilog for name, parser in subcommands.items()}}


def commands_of_help():
    for name, text in help_texts().items():
        for line in re.sub(r"\\\n\s*", "", text or "").splitlines():
            if re.match(r" *(torchrun .*-m )?madtp ", line):
                words = shlex.split(line)
                yield pytest.param(words[words.index("madtp") + 1 :], id=f"{name}: {line.strip()[:60]}")


def test_commands_are_found():
    assert len(list(commands_of_help())) > 30
    assert len(every_command()) > 15
    text = "```sh\n$ echo 1 | madtp demo --pairs 2 | head   # quick\nmadtp nlvr \\\n  --model 'a b'\npip install madtp\n```\n"
    assert list(commands(text)) == [["demo", "--pairs", "2"], ["nlvr", "--model", "a b"]]


@pytest.mark.parametrize("words", [*every_command(), *commands_of_help()])
def test_a_documented_command_is_one(words):
    try:
        cli.parser().parse_args(words)
    except SystemExit as stop:
        assert stop.code == 0, words  # --help and --version
