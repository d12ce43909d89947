import sys
from pathlib import Path

# Test modules are imported on their own; their fakes are found beside them, and with the tests of discovery.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "discovery"))
