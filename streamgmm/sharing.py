"""A training state among the processes of a `World`: the leader has it all, the others what it does not have yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from streamgmm.distributed import Message, World
from streamgmm.state import Arrays, TrainingState, pack, pack_sums, unpack, unpack_sums
from streamgmm.statistics import SummationTree


def spread(state: TrainingState | None, world: World, device: torch.device) -> TrainingState | None:
    """What the leader has, a state or None, on all processes."""
    if world.size == 1:
        return state
    sent = None
    if world.leads:
        sent = Message() if state is None else _message(*pack(state), device)
    received = world.broadcast(sent)
    if world.leads:
        return state
    return unpack(received.facts, received.tensors) if received.facts else None


def collect(
    state: TrainingState, stop: int | None, world: World, device: torch.device, idle: Callable[[], None]
) -> tuple[TrainingState, int | None] | None:
    """The sums of all processes, and the signal that asked one of them to stop, for the leader.

    ``idle`` is called now and then while others are still computing.
    """
    if world.size == 1:
        return state, stop
    facts, arrays = pack_sums(state)
    messages = world.gather(_message({**facts, "stop": stop}, arrays if not world.leads else {}, device), idle)
    if not world.leads:
        return None
    for message in messages[1:]:
        state = _joined(state, unpack_sums(state, message.facts, message.tensors))
    stops = [message.facts["stop"] for message in messages if message.facts["stop"] is not None]
    return state, min(stops, default=None)


def handed_over(state: TrainingState) -> TrainingState:
    """What is left of the state of a process that does not lead, after the leader has got its sums."""
    return replace(state, trees=tuple(SummationTree() for _ in state.trees), rows_read=0, skipped=0)


def _joined(state: TrainingState, other: TrainingState) -> TrainingState:
    return replace(
        state,
        trees=tuple(ours.merge(theirs) for ours, theirs in zip(state.trees, other.trees, strict=True)),
        opened=(*state.opened, *other.opened),
        rows_read=state.rows_read + other.rows_read,
        checksums=tuple(sorted((dict(state.checksums) | dict(other.checksums)).items())),
        skipped=state.skipped + other.skipped,
    )


def _message(facts: dict[str, object], arrays: Arrays, device: torch.device) -> Message:
    """With everything on the device: that is where the fast links are."""
    # Not as_tensor: parameters are not to be written to, and a tensor could be.
    tensors = {name: array if isinstance(array, Tensor) else torch.tensor(array) for name, array in arrays.items()}
    return Message(facts, {name: tensor.to(device) for name, tensor in tensors.items()})
