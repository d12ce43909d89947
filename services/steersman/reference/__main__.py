"""`python -m steersman.reference --model PATH`: serves log-probs under a frozen model."""

import sys

from steersman.reference.servicer import ReferenceService
from steersman.reference.settings import ReferenceSettings
from steersman.serving.app import main
from steersman.serving.metrics import Metrics
from steersman.wire.allocator import keep_freed_memory


async def build(settings: ReferenceSettings, metrics: Metrics) -> ReferenceService:
    """Loads the model and warms it up."""
    # Heavy imports wait until the settings are known to be good.
    from steersman.reference.engine.torch_engine import TorchLogprobEngine
    from steersman.reference.handler import ReferenceHandler
    from steersman.serving.batch_metrics import BatchMetrics

    engine = TorchLogprobEngine.load(settings)
    observer = BatchMetrics(metrics).observer("reference")
    batching = settings.batching.for_device(engine.device.type)
    handler = ReferenceHandler(engine, batching, stall_seconds=settings.stall_seconds, observer=observer)
    await handler.warm_up()
    return ReferenceService(handler)


if __name__ == "__main__":
    keep_freed_memory()  # a batch uses the memory of the one before
    sys.exit(main("reference", ReferenceSettings, build))
