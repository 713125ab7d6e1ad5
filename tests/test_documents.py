"""What README and messages tell users to type exists: extras, commands, options, recipes and fields."""

import re
import shlex
from importlib.metadata import metadata
from itertools import pairwise
from pathlib import Path

import pytest

import adq

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
SOURCES = "\n".join(path.read_text() for path in Path(adq.__file__).parent.rglob("*.py"))


def commands() -> list[list[str]]:
    """Every call of ``adq`` in README's blocks, as words."""
    blocks = re.findall(r"^    (.*)$", README.replace("\\\n", " "), re.MULTILINE)
    parts = [part for line in blocks for part in re.split(r"&&|\|", re.sub(r"\s#\s.*", "", line))]
    return [shlex.split(found[1]) for part in parts if (found := re.search(r"\badq ([a-z].*)", part))]


def test_extras_exist():
    named = re.findall(r"'(?:adq|\.)\[([a-z]+)\]'", README + CONTRIBUTING + SOURCES)
    assert len(set(named)) > 5
    assert set(named) <= set(metadata("adq").get_all("Provides-Extra"))


def test_commands_exist():
    pytest.importorskip("typer", reason="the command line needs the extra 'train'")
    pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
    from typer.main import get_command

    from adq.train.cli import app
    from adq.train.config import parse_assignment, recipe_names, resolve

    known = get_command(app).commands
    for name, *words in commands():
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, (name, words)
        if name == "train":
            recipes = [word for option, word in pairwise(words) if option == "--config" and "." not in word]
            assert set(recipes) <= set(recipe_names())
            changes = [parse_assignment(word) for option, word in pairwise(words) if option == "--set"]
            resolve(*(recipes or [None]), [{"data": {"root": "images"}}, *changes])
    assert {name for name, *_ in commands()} > {"train", "ablate", "eval", "export", "bench", "report"}
