"""`python -m steersman.policy --model FOLDER_OR_HUB_ID --port PORT`."""

import sys

from steersman.policy.app import build
from steersman.policy.settings import PolicySettings
from steersman.serving.app import main
from steersman.wire.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()  # chunks of weights come in at the speed of memory
    sys.exit(main("policy", PolicySettings, build))
