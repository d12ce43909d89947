"""`python -m steersman.policy --model FOLDER_OR_HUB_ID --port PORT`."""

import sys

from steersman.policy.app import build
from steersman.policy.settings import PolicySettings
from steersman.serving.app import main

if __name__ == "__main__":
    sys.exit(main("policy", PolicySettings, build))
