import sys
from pathlib import Path

# Test modules are imported on their own; programs and fakes lie beside them and with the contract tests.
_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parents[1] / "contract" / "trainer")]
