import sys
from pathlib import Path

# Test modules are imported on their own; the fakes are shared with the unit tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "policy"))
sys.path.insert(0, str(Path(__file__).parent))
