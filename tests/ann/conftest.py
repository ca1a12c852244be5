from __future__ import annotations

import pytest
import torch

from streamgmm.ann.quantizer import Quantizer, quantizer_of
from streamgmm.inference import InferenceSettings
from tests.ann.cases import overlapping


@pytest.fixture
def settings() -> InferenceSettings:
    return InferenceSettings(torch.device("cpu"), threads=2)


@pytest.fixture
def quantizer() -> Quantizer:
    return quantizer_of(overlapping())
