"""Weight versions and model identities."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.wire.convert import model_from_proto, model_to_proto, span_from_proto, span_to_proto
from steersman.wire.identity import ModelInfo, VersionSpan, WeightVersion


@pytest.mark.parametrize("version", [WeightVersion(), WeightVersion(run_id="a@b", step=12)])
def test_versions_are_written_and_read(version: WeightVersion) -> None:
    assert WeightVersion.parse(str(version)) == version


@pytest.mark.parametrize("text", ["", "run", "@3", "run@", "run@-1", "run@x"])
def test_malformed_versions(text: str) -> None:
    with pytest.raises(ValueError, match="weight version"):
        WeightVersion.parse(text)


@pytest.mark.parametrize(
    ("run_id", "job", "attempt"),
    [
        ("demo.2", "demo.", 2),
        ("lr0.1.10", "lr0.1.", 10),
        ("demo", "demo", 0),
        ("demo.", "demo.", 0),
        ("demo.02", "demo.02", 0),
        ("demo.0", "demo.0", 0),
        ("demo.x", "demo.x", 0),
        ("demo.\u0662", "demo.\u0662", 0),
        ("", "", 0),
    ],
)
def test_which_attempt_of_which_job(run_id: str, job: str, attempt: int) -> None:
    version = WeightVersion(run_id=run_id, step=1)
    assert (version.job, version.attempt) == (job, attempt)


@pytest.mark.parametrize(
    ("version", "other", "stale"),
    [
        (("demo.1", 9), ("demo.2", 3), True),
        (("demo.2", 3), ("demo.1", 9), False),
        (("demo.9", 1), ("demo.10", 0), True),
        (("demo.2", 3), ("demo.2", 3), False),
        (("demo.2", 2), ("demo.2", 3), True),
        (("demo", 2), ("demo", 3), True),
        (("demo", 2), ("demo.1", 3), False),
        (("demo.1", 2), ("other.2", 3), False),
        (("demo.1", 2), ("", 0), False),
        (("", 0), ("demo.1", 2), False),
    ],
)
def test_what_is_stale_against_what(version: tuple[str, int], other: tuple[str, int], stale: bool) -> None:
    made, against = (WeightVersion(run_id=run_id, step=step) for run_id, step in (version, other))
    assert made.is_stale_against(against) is stale


RUN_IDS = st.from_regex(r"(job|lr0)(\.[0-9]{1,2}){0,2}", fullmatch=True)
VERSIONS = st.builds(WeightVersion, run_id=RUN_IDS, step=st.integers(0, 3))


@given(VERSIONS, VERSIONS, VERSIONS)
def test_versions_of_a_job_have_one_order_and_others_none(
    one: WeightVersion, two: WeightVersion, three: WeightVersion
) -> None:
    assert not (one.is_stale_against(two) and two.is_stale_against(one))
    if one.job == two.job:
        assert one.is_stale_against(two) or two.is_stale_against(one) or one == two
    else:
        assert not one.is_stale_against(two)
    if one.is_stale_against(two) and two.is_stale_against(three):
        assert one.is_stale_against(three)


def test_identities_survive_the_wire() -> None:
    version = WeightVersion(run_id="r", step=3)
    span = VersionSpan(version=version, start=1, end=4)
    assert span_from_proto(span_to_proto(span)) == span
    model = ModelInfo(
        name="m", revision="r", weight_version=version, vocab_size=5, max_sequence_tokens=9, dtype="bfloat16",
        eos_token_ids=(1, 2),
    )  # fmt: skip
    assert model_from_proto(model_to_proto(model)) == model
