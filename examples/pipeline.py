"""Aligns a small model from scratch, end to end, and reports.

python examples/pipeline.py examples/demo.yaml
python examples/pipeline.py examples/hh_rlhf.yaml --data harmless-base-test.jsonl.gz
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository's root instead of this folder: `examples` is a package, and nothing in it hides a library.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from examples.steps.command import main

    sys.exit(main())
