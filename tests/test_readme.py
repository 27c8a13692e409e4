"""What the README says is so: its commands parse, its tree is the tree, its recipe keys exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from configs.schema import Recipe
from tilefleet import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("tilefleet ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    group = typer.main.get_command(app)
    arguments = shlex.split(line, comments=True)[1:]
    context = group.make_context("tilefleet", list(arguments), resilient_parsing=True)
    name, command, rest = group.resolve_command(context, arguments)  # type: ignore[attr-defined]
    command.make_context(name, rest)


def test_the_commands_are_all_shown() -> None:
    shown = {line.split()[1] for line in COMMANDS}
    assert shown == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_every_source_file_stands_in_the_tree() -> None:
    named = set(re.findall(r"^(?:  )?([a-z]+(?:/[a-z_]+)?\.py) ", README, re.MULTILINE))
    sources = [p for folder in ("cluster", "configs", "inference", "training") for p in (ROOT / folder).glob("*.py")]
    assert named == {p.relative_to(ROOT).as_posix() for p in sources if p.stem != "__init__"} | {"tilefleet.py"}


def test_every_recipe_key_in_the_table_exists() -> None:
    table = README.partition("| key | meaning |")[2].partition("\n\n")[0]
    keys = re.findall(r"`([a-z_.]+)`", " ".join(line.split("|")[1] for line in table.splitlines() if "`" in line))
    assert keys
    for key in keys:
        kind: type = Recipe
        for part in key.split("."):
            assert part in kind.model_fields, key  # type: ignore[attr-defined]
            kind = kind.model_fields[part].annotation  # type: ignore[attr-defined]


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", README, re.MULTILINE)) <= {
        pair for t in targets for pair in ((t, ""), ("", t))
    }
