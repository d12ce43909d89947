import sys
from pathlib import Path

# Test modules are imported on their own; programs and model makers lie beside them.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
