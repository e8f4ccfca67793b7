import re

import pytest
from click.testing import CliRunner

from relu_deploy import __version__
from relu_deploy.cli import COMMANDS, main


def test_the_group_lists_every_command_whole():
    result = CliRunner().invoke(main, ["--help"], terminal_width=120)
    assert result.exit_code == 0
    for name in COMMANDS:
        line = next(line for line in result.output.splitlines() if line.strip().startswith(f"{name} "))
        assert not line.endswith("..."), "a summary that is cut off says nothing"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_of_this_command(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert re.search(rf"^\s+relu-deploy {name} ", result.output, re.MULTILINE), "an example on a line of its own"
    assert "\\b" not in result.output


def test_version():
    assert __version__ in CliRunner().invoke(main, ["--version"]).output


def test_unknown_command_is_a_mistake_of_the_user():
    result = CliRunner().invoke(main, ["deploy"])
    assert result.exit_code == 2
    assert "No such command" in result.output
