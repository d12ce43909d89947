import json
from pathlib import Path

from torchrun import ended, torchrun

PROGRAM = str(Path(__file__).with_name("ranks_program.py"))


async def test_ranks_talk_and_the_lead_says_which_one_failed_and_why(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    async with torchrun(2, log, PROGRAM, str(tmp_path)) as process:
        assert await ended(process) == 1
    assert (tmp_path / "lead.json").exists(), log.read_text()
    assert json.loads((tmp_path / "lead.json").read_text()) == {
        "rank": 0,
        "size": 2,
        "device": "cpu",
        "sum": [1.0, 3.0, 5.0],
        "any": [True, False],
        "sent": True,
        "empty": True,
        "stop_asked": True,
        "error": "rank 1 of 2 failed: ValueError: the disk is full",
    }
