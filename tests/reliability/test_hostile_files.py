"""Models, checkpoints and settings that a stranger made: no code runs, nothing is allocated on their word alone."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgmm.checkpoint import Checkpoints, load_state, save_state
from streamgmm.errors import DamagedFileError, DataError, RunError, StreamGMMError
from streamgmm.mixture import Mixture
from streamgmm.run import read_settings
from streamgmm.storage import load_tensors, parse_json, save_tensors
from tests.test_checkpoint import CPU, HISTORY, IDENTITY, state_of
from tools import fuzz

CORPUS = Path(__file__).parent / "corpus"


def safetensors(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


HEADERS = {
    "length beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "length beyond all files": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a terabyte": safetensors({"a": {"dtype": "F64", "shape": [2**37], "data_offsets": [0, 2**40]}}),
    "offsets beyond 64 bits": safetensors({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 10**30]}}),
    "offsets that are no numbers": safetensors({"a": {"dtype": "F64", "shape": [1], "data_offsets": ["0", []]}}),
    "negative offsets": safetensors({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, -10]}}),
    "overlap": safetensors(
        {
            "a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
            "b": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
        },
        bytes(8),
    ),
    "a tensor that is a list": safetensors({"a": []}),
    "deep": safetensors(b"[" * 50_000),
    "a number of a million digits": safetensors(b'{"__metadata__":{"streamgmm":' + b"9" * 1_000_000 + b"}}"),
    "metadata that is a number": safetensors({"__metadata__": 7}),
    "metadata of the wrong type": safetensors({"__metadata__": {"streamgmm": 7, "checksum": []}}),
    "deep metadata": safetensors({"__metadata__": {"streamgmm": "[" * 50_000, "checksum": "0"}}),
    "not a number": safetensors({"__metadata__": {"streamgmm": '{"a": NaN}', "checksum": "0"}}),
    "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94",
}


@pytest.mark.parametrize("payload", HEADERS.values(), ids=HEADERS.keys())
def test_a_hostile_header_is_one_clear_error(tmp_path, payload):
    path = tmp_path / "x.safetensors"
    path.write_bytes(payload)
    with pytest.raises(DamagedFileError, match=r"x\.safetensors: not a whole streamgmm file") as caught:
        load_tensors(path)
    assert "\n" not in str(caught.value)


def test_a_sparse_file_larger_than_memory_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    size = 1 << 42
    path.write_bytes(safetensors({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}))
    os.truncate(path, path.stat().st_size + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="do not fit into memory"):
        load_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path, Path("a\0b")):
        with pytest.raises(DataError, match="cannot be read"):
            load_tensors(path)


@pytest.mark.parametrize("text", ["NaN", '{"a": [NaN]}', "[" * 100_000, "9" * 5000, "{", "", "\ud800"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises((ValueError, RecursionError)):
        parse_json(text)


def test_infinity_is_a_setting():
    assert parse_json('{"tol": Infinity, "a": -Infinity}') == {"tol": float("inf"), "a": float("-inf")}


@pytest.mark.parametrize("payload", [b"[" * 100_000, b"9" * 10_000, b"\xff\xfe", b"[]", b"null", b'{"a": NaN}'])
def test_hostile_settings_are_one_clear_error(tmp_path, payload):
    (tmp_path / "config.json").write_bytes(payload)
    with pytest.raises(DamagedFileError, match=r"config\.json: not"):
        read_settings(tmp_path)


def test_settings_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(RunError, match=r"config\.json: cannot be read \(not a regular file\)"):
        read_settings(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "whole"
    save_state(path, state_of("diag"), HISTORY, IDENTITY)
    return path


@given(data=st.binary(min_size=1, max_size=24))
@settings(max_examples=150, deadline=None)
def test_a_checkpoint_with_exchanged_facts_loads_or_is_one_clear_error(tmp_path_factory, data):
    fuzz.TARGETS["checkpoint"](tmp_path_factory.getbasetemp(), data)


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array.astype(np.float32),
        lambda array: array.reshape(-1)[:-1],
        lambda array: array[..., None],
        lambda array: np.zeros((0, 3)),
    ],
    ids=["type", "shorter", "another axis", "empty"],
)
def test_arrays_of_other_shapes_and_types_are_refused(whole, tmp_path, change):
    tensors, metadata = load_tensors(whole)
    for name in tensors:
        damaged = tmp_path / "damaged"
        save_tensors(damaged, {**tensors, name: change(tensors[name])}, metadata)
        try:
            load_state(damaged, CPU)
        except StreamGMMError as error:
            assert str(error).startswith(f"{damaged}: not a usable checkpoint (")  # noqa: PT017
        else:
            # Parameters are converted to fp64; a value that another type holds exactly is the same value.
            assert name.startswith(("candidate.", "frame.")), name


def test_a_checkpoint_that_cannot_be_read_gives_way_to_the_one_before_it(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", IDENTITY)
    for seed in (1, 2):
        checkpoints.save(state_of("diag", seed), HISTORY)
        checkpoints.flush()
    newest, older = checkpoints.paths()
    newest.unlink()
    newest.symlink_to("/dev/zero")
    heard: list[str] = []
    assert checkpoints.latest(CPU, heard.append) is not None
    assert len(heard) == 1
    assert "looking for an older one" in heard[0]
    # The next one takes the damaged one's place, not that of the one that is whole.
    checkpoints.save(state_of("diag", 0), HISTORY)
    checkpoints.flush()
    checkpoints.close()
    assert older in checkpoints.paths()
    assert newest not in checkpoints.paths()


def test_loading_a_model_imports_no_pickle(tmp_path):
    path = tmp_path / "m.safetensors"
    Mixture(np.ones(1), np.zeros((1, 2)), np.ones((1, 2)), "diag").save(path)
    program = """
import pickle, sys
from streamgmm.mixture import Mixture
def refuse(*_, **__):
    raise AssertionError("pickle was asked to load")
pickle.load = pickle.loads = pickle.Unpickler = refuse
Mixture.load(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)


def test_what_fuzzing_found_stays_mended():
    assert fuzz.replay(CORPUS) >= 3


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_slice_of_fuzzing(target):
    """Seeds with a few bytes exchanged, cut or repeated; `tools/fuzz.py` does it by coverage and for longer."""
    rng = np.random.default_rng(0)
    for seed in fuzz.seeds(target):
        fuzz.check(target, seed)
        for _ in range(12):
            data = bytearray(seed)
            for _ in range(rng.integers(1, 4)):
                if data:
                    data[rng.integers(len(data))] = rng.integers(256)
            if data and rng.random() < 0.3:
                cut = int(rng.integers(len(data)))
                data = data[:cut] + data[cut // 2 :]
            fuzz.check(target, bytes(data))
