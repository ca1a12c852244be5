"""Results on their way to the host."""

from __future__ import annotations

import pytest
import torch

from streamgmm.arriving import Arriving


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_was_sent_arrives_as_it_was(device):
    numbers = torch.arange(100_003, dtype=torch.int32, device=device).view(-1, 1)
    whole = torch.tensor(True, device=device)
    sent = Arriving.sent(numbers, whole)
    if device == "cuda":
        numbers += 1  # behind the copy
    got, there = sent.wait()
    assert got.device.type == there.device.type == "cpu"
    assert torch.equal(got[:, 0], torch.arange(100_003, dtype=torch.int32))
    assert bool(there)
