"""What Prometheus is told of the jobs that have not ended: how far each is, and the newest metrics of its steps.

The rest is in the run folder (metrics.jsonl, TensorBoard), which keeps every step. Read from the database whenever
Prometheus asks, so the service does nothing for jobs that nobody looks at. A job that ended is told of no more.
"""

import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from steersman.serving.metrics import PREFIX
from steersman.trainer.jobs.model import Job, StepMetrics

logger = logging.getLogger(__name__)

_LABELS: Final = ("job_id", "kind")

JobReadings = Sequence[tuple[Job, StepMetrics | None]]


class JobCollector(Collector):
    """Reads the active jobs. `read` may block; it is called on the thread of the metrics endpoint."""

    def __init__(self, read: Callable[[], JobReadings]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """The families, without a look at the database."""
        return self._families()

    def collect(self) -> Iterable[Metric]:
        """The families with their values. Nothing while the database does not answer: health says so."""
        try:
            readings = self._read()
        except sqlite3.Error:
            logger.warning("no metrics of jobs", exc_info=True)
            return ()
        steps, totals, values = families = self._families()
        for job, newest in readings:
            labels = (job.id, str(job.spec.kind))
            steps.add_metric(labels, job.progress.step)
            totals.add_metric(labels, job.progress.total_steps)
            for name, value in newest.values.items() if newest else ():
                values.add_metric((*labels, name), value)
        return families

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily(f"{PREFIX}job_step", "Steps that a job has done.", labels=_LABELS),
            GaugeMetricFamily(f"{PREFIX}job_total_steps", "Steps that a job will do; 0: not known.", labels=_LABELS),
            GaugeMetricFamily(
                f"{PREFIX}job_metric", "A metric of a job's newest step, by its name.", labels=(*_LABELS, "metric")
            ),
        )
