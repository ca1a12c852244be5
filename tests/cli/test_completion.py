"""Shells complete commands, options and file names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import click
import pytest
from click.shell_completion import BashComplete

from streamgmm.cli import cli
from streamgmm.cli.commands import NAMES

SHELLS = ("bash", "zsh", "fish")


def completed(*words: str) -> list[tuple[str, str]]:
    """What a shell is told when TAB is pressed behind the last of ``words``: types and values."""
    *before, incomplete = words
    found = BashComplete(cli, {}, "streamgmm", "_STREAMGMM_COMPLETE").get_completions(before, incomplete)
    return [(item.type, item.value) for item in found]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed(call, shell):
    outcome = call("completion", shell)
    assert outcome.status == 0
    assert "_STREAMGMM_COMPLETE" in outcome.stdout
    assert call("completion", shell, "--json").json == {"shell": shell, "script": outcome.stdout.removesuffix("\n")}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_itself_takes_the_script(call, shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    script = tmp_path / "script"
    script.write_text(call("completion", shell).stdout)
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_tells_how_to_install_it(call):
    text = call("completion", "--help").stdout
    for place in ("~/.local/share/bash-completion/completions/streamgmm", "~/.zshrc", "~/.config/fish/completions"):
        assert place in text


def test_another_shell_is_refused(refused):
    refused("completion", "csh", told=("csh", "bash", "zsh", "fish"))
    refused("completion", told=("Missing argument", "bash"))


def test_tab_completes_commands_options_and_files():
    assert completed("sc") == [("plain", "score")]
    assert ("plain", "--quantile") in completed("score", "--qu")
    assert ("plain", "float16") in completed("sample", "run", "5", "y.npy", "--dtype", "")
    assert completed("report", "ru") == [("file", "ru")]


def test_the_command_itself_answers_the_script():
    asked = {"_STREAMGMM_COMPLETE": "bash_complete", "COMP_WORDS": "streamgmm predi", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "streamgmm"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("plain,predict\n", "")


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"completion", "sample"}))
def test_every_argument_that_is_a_path_completes_to_files(name):
    command = cli.get_command(click.Context(cli), name)
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    assert all(isinstance(argument.type, click.Path) for argument in arguments), arguments
