import sys
from pathlib import Path

# Test modules are imported on their own; programs lie beside them, and the tiny job with the other tests of PPO.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "ppo")]
