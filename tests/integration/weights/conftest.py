import sys
from pathlib import Path

# Test modules are imported on their own; programs and model makers lie beside them.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "policy")]
