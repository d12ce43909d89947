import sys
from pathlib import Path

# Test modules are imported on their own; programs lie beside them, and the policy with gates with the weights.
sys.path.insert(0, str(Path(__file__).parent))
