from pathlib import Path

from steersman.trainer.weights.attempt import ATTEMPT_FILE, next_attempt


def test_every_start_of_a_run_has_a_number_of_its_own(tmp_path: Path) -> None:
    assert [next_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    # What a writer that died leaves behind is not read.
    (tmp_path / ATTEMPT_FILE).with_suffix(".partial").write_text("{")
    assert next_attempt(tmp_path) == 4
