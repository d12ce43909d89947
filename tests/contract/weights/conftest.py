import sys
from pathlib import Path

# Test modules are imported on their own; the servers and their fakes are those of the policy's tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "policy"))
sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
sys.path.insert(0, str(Path(__file__).parent))
