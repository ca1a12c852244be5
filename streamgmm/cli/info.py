"""``streamgmm info``."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from streamgmm.checkpoint import Checkpoints
from streamgmm.cli.options import as_json, print_result, warn
from streamgmm.io.advice import describe_reading
from streamgmm.io.bfloat16 import type_name
from streamgmm.io.sources import open_source
from streamgmm.mixture import Mixture, load_model, load_transformation
from streamgmm.run import read_settings
from streamgmm.units import format_bytes

Facts = dict[str, object]


@click.command(epilog="Example: streamgmm info vectors.zarr; streamgmm info run --json")
@click.argument("name", metavar="PATH", type=click.Path())
@as_json
def info(name: str, as_json: bool) -> None:
    """What PATH is: a data set, a RUN folder, or a model file."""
    path = Path(name)
    if path.suffix == ".safetensors" or (path / "model.safetensors").exists():
        facts = _model(path)
    elif (path / "config.json").exists():
        facts = _unfinished(path)
    else:
        facts = _data(name)
    lines = [f"{name:<22}{_told(value)}" for name, value in facts.items() if name != "result"]
    print_result(facts, lines, as_json=as_json)


def _told(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _model(path: Path) -> Facts:
    mixture, metadata = load_model(path)
    result = metadata.get("result")
    facts: Facts = {
        "kind": "run" if path.is_dir() else "model",
        "state": "finished",
        "n_components": mixture.n_components,
        "n_features": mixture.n_features,
        "covariance_type": mixture.covariance_type,
        **_weights_of(mixture),
        "digest": mixture.digest,
    }
    transformation = load_transformation(path)
    if transformation is not None:
        facts["prepared"] = transformation.describe()
    if isinstance(result, dict):
        told = ("n_samples", "n_iter", "n_passes", "converged", "lower_bound", "held_out", "bic", "aic", "sizes")
        facts |= {name: result[name] for name in told if name in result}
        facts["result"] = result
    return facts


def _unfinished(path: Path) -> Facts:
    config = read_settings(path)
    told = ("n_components", "covariance_type", "shape")
    facts: Facts = {"kind": "run", "state": "unfinished", **{name: config.get(name) for name in told}}
    if not (path / "checkpoints").is_dir():
        return facts
    checkpoints = Checkpoints(path / "checkpoints", config)
    found = checkpoints.latest(torch.device("cpu"), warn)
    checkpoints.close()
    if found is not None:
        state, shape = found[0], config.get("shape")
        n_samples = int(shape[0]) if isinstance(shape, list) else 0
        facts |= {
            "n_iter": state.n_iter,
            "cursor": state.rows_summed(n_samples),
            "rows_read": state.rows_read,
            "lower_bound": state.best.lower_bounds[-1] if state.best.lower_bounds else None,
            **_weights_of(state.best.result),
            "digest": state.best.result.digest,
        }
    return facts


def _weights_of(mixture: Mixture) -> Facts:
    """How much there is of a mixture, and how evenly its weight is spread."""
    return {
        "n_parameters": mixture.n_parameters,
        "effective_components": mixture.effective_components,
        "heaviest_weight": float(mixture.weights.max()),
        "lightest_weight": float(mixture.weights.min()),
    }


def _data(path: str) -> Facts:
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
        **describe_reading(source),
        "read_granule": source.read_granule,
        **({} if source.transformation is None else {"prepared": source.transformation.describe()}),
        "fingerprint": source.fingerprint,
    }
