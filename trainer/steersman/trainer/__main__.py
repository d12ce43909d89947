"""`python -m steersman.trainer`: serves TrainerService."""

import sys

from steersman.trainer.jobs.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
