"""torchrun whose exit status tells why: `python -m steersman.trainer.jobs.torchrun ARGUMENTS OF TORCHRUN`.

By itself it exits with 1 for every failure of a worker, so that one which wrote its checkpoint and ended because it was
told to could not be told from one that broke.
"""

import signal
import sys
from collections.abc import Sequence

from steersman.cluster.objects import EXIT_STOPPED

EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs torchrun to its end. Returns 0 if all workers of this node did, EXIT_STOPPED if told to stop, or 1."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    try:
        run(list(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        # One that was told to stop before it listened for that has no checkpoint to write.
        return EXIT_STOPPED if codes <= {EXIT_STOPPED, -signal.SIGTERM} else EXIT_FAILED
    except SignalException:
        return EXIT_STOPPED  # before there were workers
    return 0


if __name__ == "__main__":
    sys.exit(main())
