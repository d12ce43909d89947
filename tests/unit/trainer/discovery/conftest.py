import sys
from pathlib import Path

# Test modules are imported on their own; their fakes are found beside them.
sys.path.insert(0, str(Path(__file__).parent))
