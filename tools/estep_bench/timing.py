"""Every shape × data × covariance type, ours and the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from streamgmm.errors import StreamGMMError

from .ceilings import Ceilings
from .flash_gmm import FOR_HOPPER, measure_flash_gmm, precision_of
from .flash_kmeans import measure_flash_kmeans
from .ours import measure_ours
from .session import Record, Session
from .torch_estep import MODES, measure_torch
from .workloads import DATA, SHAPES, Drawn, Shape, Workload, draw_rows, liveness, recipe_of, workload


@dataclass(frozen=True, eq=False)
class Subject:
    """What a measurement is given: a workload, its rows as they are stored, and what is known of both."""

    case: Workload
    stored: dict[str, Tensor]
    overlap: Record
    ceilings: Ceilings | None


@dataclass(frozen=True)
class Measurement:
    """One line to come; its labels are known before any row is drawn."""

    labels: Record
    measure: Callable[[Subject], Record]


def bench(session: Session) -> list[Record]:
    """Measure what ``--only`` finds; rows are drawn, and parameters fitted, only where it finds something."""
    ceilings = Ceilings.measured(session.device) if session.device.type == "cuda" else None
    if ceilings is not None:
        print(f"# ceilings: {ceilings}", flush=True)
    records: list[Record] = []
    for shape in (shape.shrunk(session.rows) for shape in SHAPES):
        for data in DATA:
            plans = {kind: plan(session, shape, data, kind) for kind in shape.covariance_types}
            if any(plans.values()):
                records += _bench_rows(session, shape, data, plans, ceilings)
    return records


def _bench_rows(
    session: Session, shape: Shape, data: str, plans: dict[str, list[Measurement]], ceilings: Ceilings | None
) -> list[Record]:
    drawn: Drawn | None = None
    records: list[Record] = []
    for kind, measurements in plans.items():
        if not measurements:
            continue
        if drawn is None or drawn.recipe != recipe_of(data, kind):
            drawn = None  # its memory first
            drawn = draw_rows(recipe_of(data, kind), shape, session.device)
            stored = {"float32": drawn.rows, "float16": drawn.rows.half()}
        try:
            case = workload(data, drawn, shape.k, kind)
            subject = Subject(case, stored, liveness(case), ceilings)
        except (StreamGMMError, RuntimeError) as error:
            print(f"# {data} {kind}: no parameters: {error}", flush=True)
            continue
        records += [session.attempt(m.labels, partial(m.measure, subject)) for m in measurements]
    return records


def plan(session: Session, shape: Shape, data: str, kind: str) -> list[Measurement]:
    """The measurements of one workload that ``--only`` finds."""
    base = {"n": shape.n, "k": shape.k, "d": shape.d, "covariance_type": kind, "data": data}
    found = _ours(session, shape, kind) + _peers(session, shape, data, kind)
    named = [Measurement(base | m.labels, m.measure) for m in found]
    return [m for m in named if session.wants(m.labels)]


def _ours(session: Session, shape: Shape, kind: str) -> list[Measurement]:
    def one(precision: str, stored: str) -> Measurement:
        return Measurement(
            {"stored": stored, "precision": precision, "implementation": "streamgmm"},
            lambda s: measure_ours(s.case, s.stored[stored], precision, session.repeats, s.ceilings, s.overlap),
        )

    precisions = ("medium", "high") if kind in shape.high else ("medium",)
    types = ("float32",) if session.quick else ("float32", "float16")
    return [one(precision, stored) for precision in precisions for stored in types]


def _peers(session: Session, shape: Shape, data: str, kind: str) -> list[Measurement]:
    found: list[Measurement] = []
    # Peers that take long are measured where it says most: a dense pass and full covariances cost the same on any data.
    slow = shape.k > 4096 or kind == "full"
    if data == "realistic" or not slow:
        found += [_torch(session, precision) for precision in MODES]
        if session.flash_gmm is not None and kind in FOR_HOPPER:
            found.append(_flash_gmm(session, shape.d))
    if kind == "spherical" and session.flash_kmeans is not None:
        found += [_flash_kmeans(session, stored) for stored in ("float16", "float32")[: 1 if session.quick else 2]]
    return found


def _torch(session: Session, precision: str) -> Measurement:
    return Measurement(
        {"stored": "float32", "precision": precision, "implementation": "torch"},
        lambda s: measure_torch(s.case, precision, session.repeats),
    )


def _flash_gmm(session: Session, n_features: int) -> Measurement:
    return Measurement(
        {"stored": "float32", "precision": precision_of(n_features), "implementation": "flash-gmm"},
        lambda s: measure_flash_gmm(s.case, session.repeats),
    )


def _flash_kmeans(session: Session, stored: str) -> Measurement:
    library = session.flash_kmeans
    assert library is not None
    return Measurement(
        {"covariance_type": "k-means", "stored": stored, "precision": stored, "implementation": "flash-kmeans"},
        lambda s: measure_flash_kmeans(library, s.case, s.stored[stored], session.repeats),
    )
