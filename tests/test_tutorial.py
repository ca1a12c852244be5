"""The tutorial's code does what it says, and prints what it shows."""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamgmm.cli import main

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TOLERANCE = 0.05
"""Relative: other processors round differently, and EM then goes another way to much the same place."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line it begins in."""

    language: str
    text: str
    line: int


def blocks() -> list[Block]:
    page = TUTORIAL.read_text()
    return [Block(found[1], found[2], page[: found.start()].count("\n") + 2) for found in FENCE.finditer(page)]


def agree(shown: str, printed: str) -> bool:
    """Whether two texts are the same but for numbers that are nearly so."""
    ours, theirs = shown.split(), printed.split()
    return len(ours) == len(theirs) and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))


def _same(a: str, b: str) -> bool:
    try:
        return float(a) == pytest.approx(float(b), rel=TOLERANCE, abs=0.02)
    except ValueError:
        return a == b


def test_every_block_runs_and_prints_what_is_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "tutorial"}
    printed = ""
    for block in blocks():
        if block.language == "python":
            output = io.StringIO()
            # As many lines before it as in the file: a traceback then names the right one.
            code = compile("\n" * (block.line - 1) + block.text, str(TUTORIAL), "exec")
            with redirect_stdout(output):
                exec(code, namespace)
            printed = output.getvalue()
        elif block.language == "text":
            assert agree(block.text, printed), f"line {block.line} shows\n{block.text}\nand the code printed\n{printed}"
        else:
            assert block.language == "console"
            for line in block.text.splitlines():
                prompt, command, *arguments = shlex.split(line)
                assert (prompt, command) == ("$", "streamgmm")
                with pytest.raises(SystemExit) as left:
                    main(arguments)
                assert not left.value.code, (line, capfd.readouterr().err)
    assert Path("run/report.html").stat().st_size > 50_000
    for picture in ("projection", "weights", "conditions", "selection"):
        assert Path(f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_every_output_is_shown():
    """Code that prints is followed by what it prints."""
    found = blocks()
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language == "python" and re.search(r"^\s*print\(", block.text, re.MULTILINE):
            assert after is not None
            assert after.language == "text", f"line {block.line}"
            assert after.text.strip(), f"line {after.line}"
