"""Weight versions and model identities."""

import pytest

from steersman.wire.convert import model_from_proto, model_to_proto, span_from_proto, span_to_proto
from steersman.wire.identity import ModelInfo, VersionSpan, WeightVersion


@pytest.mark.parametrize("version", [WeightVersion(), WeightVersion(run_id="a@b", step=12)])
def test_versions_are_written_and_read(version: WeightVersion) -> None:
    assert WeightVersion.parse(str(version)) == version


@pytest.mark.parametrize("text", ["", "run", "@3", "run@", "run@-1", "run@x"])
def test_malformed_versions(text: str) -> None:
    with pytest.raises(ValueError, match="weight version"):
        WeightVersion.parse(text)


def test_identities_survive_the_wire() -> None:
    version = WeightVersion(run_id="r", step=3)
    span = VersionSpan(version=version, start=1, end=4)
    assert span_from_proto(span_to_proto(span)) == span
    model = ModelInfo(
        name="m", revision="r", weight_version=version, vocab_size=5, max_sequence_tokens=9, dtype="bfloat16",
        eos_token_ids=(1, 2),
    )  # fmt: skip
    assert model_from_proto(model_to_proto(model)) == model
