"""The guide's examples of preparation do what they say."""

from __future__ import annotations

import io
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streamgmm.cli import main
from tests.test_tutorial import FENCE

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


@pytest.mark.filterwarnings("ignore")
def test_every_example_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    Path("base.fbin").write_bytes(np.array(x.shape, "<u4").tobytes() + x.tobytes())
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 64)
    pq.write_table(pa.table({"id": [f"row {i}" for i in range(2000)], "embedding": vectors}), "vectors.parquet")
    section = GUIDE.read_text().split("## Preparing data\n")[1].split("\n## ")[0]
    printed, ran = io.StringIO(), []
    for language, text in FENCE.findall(section):
        if language == "console":
            for line in text.splitlines():
                prompt, command, *arguments = shlex.split(line)
                assert (prompt, command) == ("$", "streamgmm")
                with pytest.raises(SystemExit) as left:
                    main(arguments)
                assert not left.value.code, (line, capfd.readouterr().err)
                ran.append(arguments[0])
        else:
            assert language == "python"
            with redirect_stdout(printed):
                exec(compile(text, str(GUIDE), "exec"), {"__name__": "guide"})
    assert ran == ["prepare", "prepare", "fit", "score", "predict"]
    assert printed.getvalue().splitlines() == [
        "(30000, 32) 64 → 32 features (standardise, pca=32), int8",
        "(2000,)",
    ]
    assert np.load("labels.npy").shape == (2000,)
