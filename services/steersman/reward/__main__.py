"""`python -m steersman.reward --config FILE` or `--model PATH`: serves scores."""

import sys

from steersman.reward.settings import RewardSettings
from steersman.serving import vllm_environment
from steersman.serving.app import main
from steersman.serving.metrics import Metrics
from steersman.serving.server import make_gate
from steersman.serving.service import Service
from steersman.wire.allocator import keep_freed_memory


async def build(settings: RewardSettings, metrics: Metrics) -> Service:
    """Loads all scorers and warms them up."""
    if settings.uses_vllm():
        vllm_environment.prepare(
            on_cpu=vllm_environment.runs_on_cpu(), num_threads=settings.num_threads, separate_processes=True
        )
    keep_freed_memory()
    # Heavy imports wait until the settings are known to be good.
    from steersman.reward.build import build_handler
    from steersman.reward.servicer import RewardService

    handler, manager = await build_handler(settings, metrics)
    if settings.http_port is None:
        return RewardService(handler, manager)
    from steersman.reward.http.app import make_app
    from steersman.reward.http.server import start_http

    app = make_app(
        handler,
        metrics,
        make_gate(settings),
        max_body_bytes=settings.max_message_bytes,
        timeout_seconds=settings.http_timeout_seconds,
    )
    http = await start_http(
        app,
        host=settings.host,
        port=settings.http_port,
        max_concurrent_calls=settings.max_concurrent_rpcs,
        grace_seconds=settings.grace_seconds,
        tls=settings.tls,
    )
    return RewardService(handler, manager, http)


if __name__ == "__main__":
    sys.exit(main("reward", RewardSettings, build))
