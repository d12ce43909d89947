"""Makes the scorers that the settings name."""

from steersman.reward.engine.torch_engine import TorchScoreEngine
from steersman.reward.function_scorer import FunctionScorer
from steersman.reward.handler import RewardHandler
from steersman.reward.model_scorer import ModelScorer
from steersman.reward.plugin import load_function
from steersman.reward.settings import FunctionScorerSettings, ModelScorerSettings, RewardSettings
from steersman.reward.text import Encoding, TextEncoder
from steersman.reward.types import Scorer
from steersman.serving.batch_metrics import BatchMetrics
from steersman.serving.metrics import Metrics
from steersman.serving.models import load_tokenizer, use_threads


async def build_handler(settings: RewardSettings, metrics: Metrics) -> RewardHandler:
    """Loads all models and functions and warms them up. `ValueError` names the setting that is wrong."""
    use_threads(settings.num_threads)
    batch_metrics = BatchMetrics(metrics)
    scorers: dict[str, Scorer] = {}
    named = settings.named_scorers()
    for name, scorer in named.items():
        field = f"scorers.{name}"
        if isinstance(scorer, FunctionScorerSettings):
            scorers[name] = build_function_scorer(field, name, scorer)
        else:
            scorers[name] = await build_model_scorer(
                field, name, scorer, metrics=batch_metrics, stall_seconds=settings.stall_seconds
            )
    return RewardHandler(scorers, settings.default_scorer or next(iter(named)))


async def build_model_scorer(
    field: str, name: str, settings: ModelScorerSettings, *, metrics: BatchMetrics, stall_seconds: float
) -> ModelScorer:
    """One model, loaded and warm."""
    engine = TorchScoreEngine.load(field, settings)
    tokenizer = load_tokenizer(settings.model, settings.revision)
    encoder = None
    if tokenizer is not None:
        try:
            encoder = TextEncoder(tokenizer, choose_encoding(settings, engine.encoding))
        except ValueError as error:
            raise ValueError(f"{field}.{error}") from None
    scorer = ModelScorer(
        name,
        engine,
        settings.batching.for_device(engine.device.type),
        encoder=encoder,
        bos_token_id=tokenizer.bos_token_id if tokenizer is not None else None,
        stall_seconds=stall_seconds,
        observer=metrics.observer(name),
    )
    await scorer.warm_up()
    return scorer


def build_function_scorer(field: str, name: str, settings: FunctionScorerSettings) -> FunctionScorer:
    """One function."""
    function = load_function(f"{field}.function", settings.function)
    decoder = None
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings.tokenizer)
        if tokenizer is None:
            raise ValueError(f"{field}.tokenizer: is {settings.tokenizer!r}, allowed: a folder or hub id with one")
        decoder = TextEncoder(tokenizer, "template")
    return FunctionScorer(name, function, settings, decoder=decoder)


def choose_encoding(settings: ModelScorerSettings, of_model: str | None) -> Encoding:
    """What the settings say, else what the model's configuration says, else template."""
    wanted = of_model or "template" if settings.encoding == "auto" else settings.encoding
    if wanted == "template":
        return "template"
    if wanted == "continuation":
        return "continuation"
    raise ValueError(f"model: its reward_encoding is {wanted!r}, allowed: template, continuation")
