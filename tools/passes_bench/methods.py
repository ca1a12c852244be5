"""The schedules compared, by name: each starts from the same sample and counts every row it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch

from passes_bench import passes
from passes_bench.engine import Engine
from passes_bench.growth import grown
from passes_bench.order import design_effects, granule_means, natural_order
from streamgmm.mixture import Mixture
from streamgmm.passes import stratified_order

BASELINE = "kmeans + 30 EM"
RECOMMENDED = "grown + windowed 3+1"
STEPS_A_PASS = 50

Method = Callable[[Engine, int, int], Iterator[Mixture]]
Start = Callable[[Engine, int, int], Mixture]
Tail = Callable[[Engine, Mixture], Iterator[Mixture]]


def _kmeans(engine: Engine, n_components: int, seed: int) -> Mixture:
    return engine.seeded(n_components, seed)


def _kmeans_em(engine: Engine, n_components: int, seed: int) -> Mixture:
    return engine.em(engine.seeded(n_components, seed), engine.sample, 10)


def _block(engine: Engine, steps: int = STEPS_A_PASS) -> int:
    return -(-len(engine.rows) // steps)


def _method(start: Start, tail: Tail) -> Method:
    """The start, then the mixture after each pass."""

    def run(engine: Engine, n_components: int, seed: int) -> Iterator[Mixture]:
        mixture = start(engine, n_components, seed)
        return chain([mixture], tail(engine, mixture))

    return run


def _full(count: int) -> Tail:
    return lambda engine, mixture: passes.full_batch(engine, mixture, count)


def _windowed(engine: Engine, mixture: Mixture) -> Iterator[Mixture]:
    return passes.windowed(engine, mixture, 4, passes.as_they_lie(engine, STEPS_A_PASS))


def _shuffled(granules: int, widened: bool) -> Tail:
    """Granules visited in a stratified random order; ``widened`` by the design effect that pass 0 would find."""

    def tail(engine: Engine, mixture: Mixture) -> Iterator[Mixture]:
        order = passes.shuffled_granules(engine, STEPS_A_PASS, granules, seed=0)
        effect = order_effect(engine, granules) if widened else 1.0
        return passes.windowed(engine, mixture, 4, order, effect)

    return tail


def order_effect(engine: Engine, granules: int) -> float:
    """Mean design effect of steps of so many granules in the stratified order; of rows as they lie for 0."""
    count = STEPS_A_PASS * max(granules, 1)
    pieces = torch.tensor_split(engine.rows, count)
    centre, scale = engine.sample.double().mean(0).numpy(), engine.sample.double().std(0).numpy()
    seen = granule_means((piece.numpy() for piece in pieces), centre, scale)
    steps = stratified_order(count, STEPS_A_PASS, 0, 0) if granules else natural_order(count, STEPS_A_PASS)
    return float(design_effects(seen, steps).mean())


METHODS: dict[str, Method] = {
    BASELINE: _method(_kmeans, _full(30)),
    "kmeans + sample EM + windowed 3+1": _method(_kmeans_em, _windowed),
    "grown + 4 EM": _method(grown, _full(4)),
    RECOMMENDED: _method(grown, _windowed),
    "grown by weight + windowed 3+1": _method(partial(grown, by_gain=False), _windowed),
    "grown + (t+2)^-0.6 3+1": _method(
        grown, lambda e, m: passes.decaying(e, m, 4, passes.as_they_lie(e, STEPS_A_PASS), 0.6)
    ),
    "grown + incremental, 20 blocks": _method(grown, lambda e, m: passes.incremental(e, m, 4, _block(e, 20))),
    "grown + variance-reduced 0.2": _method(grown, lambda e, m: passes.variance_reduced(e, m, 4, _block(e), 0.2)),
    "grown + SQUAREM": _method(grown, lambda e, m: passes.squarem(e, m, 4)),
    "grown + 30 EM": _method(grown, _full(30)),
}
"""For rows in random order."""

GRANULES = (4, 16, 64)

SORTED_BASELINE = "grown + 4 EM"

SORTED_METHODS: dict[str, Method] = {
    "grown + 4 EM": METHODS["grown + 4 EM"],
    "as they lie": _method(grown, _windowed),
    **{f"{g} granules a step": _method(grown, _shuffled(g, widened=False)) for g in GRANULES},
    **{f"{g} granules a step, widened": _method(grown, _shuffled(g, widened=True)) for g in GRANULES},
}
"""For rows sorted by cluster: 50 steps a pass of so many granules each."""
