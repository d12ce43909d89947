import sys
from pathlib import Path

import pytest
from transformers import Qwen2ForSequenceClassification

# Test modules are imported on their own; what they share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from reward_fakes import tiny_model


@pytest.fixture(scope="module")
def model() -> Qwen2ForSequenceClassification:
    return tiny_model()
