"""``streamgmm info``."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from streamgmm.checkpoint import Checkpoints
from streamgmm.cli.options import as_json, print_result
from streamgmm.io.bfloat16 import type_name
from streamgmm.io.sources import open_source
from streamgmm.mixture import load_model
from streamgmm.run import read_settings
from streamgmm.units import format_bytes

Facts = dict[str, object]


@click.command(epilog="Example: streamgmm info vectors.zarr; streamgmm info run --json")
@click.argument("path", type=click.Path(path_type=Path))
@as_json
def info(path: Path, as_json: bool) -> None:
    """What PATH is: a data set, a RUN folder, or a model file."""
    if path.suffix == ".safetensors" or (path / "model.safetensors").exists():
        facts = _model(path)
    elif (path / "config.json").exists():
        facts = _unfinished(path)
    else:
        facts = _data(path)
    lines = [f"{name:<17}{value}" for name, value in facts.items() if name != "result"]
    print_result(facts, lines, as_json=as_json)


def _model(path: Path) -> Facts:
    mixture, metadata = load_model(path)
    result = metadata.get("result")
    facts: Facts = {
        "kind": "run" if path.is_dir() else "model",
        "state": "finished",
        "n_components": mixture.n_components,
        "n_features": mixture.n_features,
        "covariance_type": mixture.covariance_type,
        "digest": mixture.digest,
    }
    if isinstance(result, dict):
        facts |= {name: result.get(name) for name in ("n_samples", "n_iter", "n_passes", "converged", "lower_bound")}
        facts["result"] = result
    return facts


def _unfinished(path: Path) -> Facts:
    config = read_settings(path)
    facts: Facts = {"kind": "run", "state": "unfinished", **{k: config.get(k) for k in ("n_components", "shape")}}
    if not (path / "checkpoints").is_dir():
        return facts
    checkpoints = Checkpoints(path / "checkpoints", config)
    found = checkpoints.latest(torch.device("cpu"), lambda text: click.echo(f"streamgmm: warning: {text}", err=True))
    checkpoints.close()
    if found is not None:
        state = found[0]
        facts |= {
            "n_iter": state.n_iter,
            "cursor": state.cursor,
            "lower_bound": state.best.lower_bounds[-1] if state.best.lower_bounds else None,
            "digest": state.best.mixture.digest,
        }
    return facts


def _data(path: Path) -> Facts:
    source = open_source(path)
    n, d = source.shape
    size = n * d * source.dtype.itemsize
    return {
        "kind": "data",
        "n_samples": n,
        "n_features": d,
        "dtype": type_name(source.dtype),
        "bytes": size,
        "size": format_bytes(size),
        "files": len(source.files()),
        "read_path": source.read_path,
        "read_granule": source.read_granule,
        "fingerprint": source.fingerprint,
    }
