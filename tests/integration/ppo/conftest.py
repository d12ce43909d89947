import sys
from pathlib import Path

# Test modules are imported on their own; the API server of the tests lies with the unit tests of discovery.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "trainer" / "discovery"))
