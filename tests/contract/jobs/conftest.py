import sys
from pathlib import Path

# Fakes are found with the unit tests of what they stand for.
UNIT = Path(__file__).parents[2] / "unit" / "trainer"
sys.path[:0] = [str(UNIT / "jobs_kubernetes"), str(UNIT / "discovery")]
