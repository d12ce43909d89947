"""`python -m steersman.trainer.jobs`: serves TrainerService."""

import sys

from steersman.serving import app
from steersman.trainer.jobs.service import build
from steersman.trainer.jobs.settings import TrainerSettings


def main() -> int:
    """Serves until told to stop. Returns the exit status."""
    return app.main("trainer", TrainerSettings, build)


if __name__ == "__main__":
    sys.exit(main())
