"""The process of one job: `python -m steersman.trainer.jobs.worker RUN_DIR`.

    own the run folder -> record itself as RUNNING -> run the stage -> record how it ended

Invariant: the end is recorded once, as the last thing, while the folder is still owned; a worker that dies before is
noticed by the service. Where torchrun started several, rank 0 does all this, and the others run the stage with it.
SIGTERM asks the stage to write a checkpoint and return. Where a cluster started the worker, and takes its node away,
the job is PENDING then, and the cluster starts it again.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from steersman.cluster.objects import ENV_HANDLE, ENV_NODES, ENV_SPEC, EXIT_STOPPED
from steersman.serving import logging as serving_logging
from steersman.trainer.distributed.world import SOLO, World, launched_rank, launched_size
from steersman.trainer.jobs import folder, standalone
from steersman.trainer.jobs.events import EventWriter
from steersman.trainer.jobs.launcher import ENV_PROCESS, EXIT_FOLDER_IN_USE, process_handle
from steersman.trainer.jobs.model import JobState
from steersman.trainer.jobs.registry import STAGES, Stages
from steersman.trainer.jobs.store import JobStore
from steersman.wire.allocator import keep_freed_memory
from steersman.wire.errors import Reason, SteersmanError

logger = logging.getLogger(__name__)

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

# What the lead tells the other ranks first.
_BEGIN: Final = "begin"
_NOTHING_TO_DO: Final = "nothing to do"

# The worker before may have recorded its end and not yet be gone; the service may be looking at the lock.
OWN_PATIENCE_SECONDS: Final = 5.0
# The node before may have died: a network file system frees its locks when their lease ends (NFS: 90 s by default).
CLUSTER_PATIENCE_SECONDS: Final = 150.0


class StopFlag:
    """Set by SIGTERM and SIGINT. The stage asks between steps."""

    def __init__(self) -> None:
        self._set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __call__(self) -> bool:
        return self._set

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._set = True


def main(argv: Sequence[str] | None = None, stages: Stages = STAGES) -> int:
    """Runs the job of a run folder to its end. Returns 0 if it succeeded or was cancelled, EXIT_STOPPED if it is to be
    started again."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m steersman.trainer.jobs.worker RUN_DIR\n")
        return EXIT_USAGE
    keep_freed_memory()  # chunks of weights go out at the speed of memory
    stop = StopFlag()
    serving_logging.configure("worker", os.environ.get("STEERSMAN_LOG_LEVEL", "info"), "text")
    directory = Path(arguments[0]).resolve()
    # Under torchrun the node has made the folder ready, before all ranks.
    if (spec := os.environ.get(ENV_SPEC)) and "RANK" not in os.environ:
        try:
            if not standalone.prepare(directory, Path(spec)):
                return 0
        except (OSError, ValueError, SteersmanError) as error:
            logger.error("cannot use the run folder: %s", error)
            return EXIT_FAILED
    if launched_rank() > 0:
        return _follow(directory, stop, stages)
    patience = CLUSTER_PATIENCE_SECONDS if ENV_HANDLE in os.environ else OWN_PATIENCE_SECONDS
    deadline = time.monotonic() + patience
    while True:
        try:
            with folder.own(directory):
                return _run_job(directory, stop, stages)
        except folder.FolderInUse as error:
            if time.monotonic() > deadline:
                logger.error("%s", error)
                return EXIT_FOLDER_IN_USE
            time.sleep(0.1)


def _run_job(directory: Path, stop: StopFlag, stages: Stages) -> int:
    job_file = folder.read_job_file(directory)
    cluster_handle = os.environ.get(ENV_HANDLE, "")
    store = JobStore(directory / job_file.database, journal=None)
    try:
        try:
            job = store.begin(job_file.job_id, cluster_handle or _local_handle())
        except SteersmanError as error:
            # It was cancelled before this worker was up.
            logger.warning("not started: %s", error)
            return EXIT_FAILED
        logger.info("job begins", extra={"job": job.id, "kind": job.spec.kind, "attempt": job.num_attempts})
        state, error_text = JobState.CANCELLED, ""
        if job.state is JobState.RUNNING:
            state, error_text = _run_stage(directory, job_file, store, stop, stages)
        elif launched_size() > 1:
            with _join(directory) as world:
                world.tell(_NOTHING_TO_DO)
        if state is JobState.CANCELLED and store.get(job.id).state is not JobState.CANCELLING:
            if cluster_handle:
                store.move(job.id, JobState.PENDING, error="the cluster took its node; its checkpoint is written")
                logger.info("job was stopped, to be started again", extra={"job": job.id})
                return EXIT_STOPPED
            state = JobState.FAILED
            error_text = "the worker was told to stop (SIGTERM) by someone else than CancelJob; resume it to go on"
        if state is JobState.FAILED and _state_of_failure() is JobState.PENDING:
            store.move(job.id, JobState.PENDING, error=error_text)
            return EXIT_FAILED
        store.move(job.id, state, error=error_text)
        logger.info("job ends", extra={"job": job.id, "state": state})
        return EXIT_FAILED if state is JobState.FAILED else 0
    finally:
        store.close()


def _run_stage(
    directory: Path, job_file: folder.JobFile, store: JobStore, stop: StopFlag, stages: Stages
) -> tuple[JobState, str]:
    """Runs the stage. Returns the state that the job ends in, and why if it failed."""
    # Whoever has no access to the run folder follows the log of the pod.
    echo = _print_line if ENV_HANDLE in os.environ else None
    events = EventWriter(store, job_file.job_id, echo=echo)
    events.on_progress(0, 0, "starting")
    world: World = SOLO
    try:
        with ExitStack() as stack:
            world = stack.enter_context(_join(directory))
            world.tell(_BEGIN)
            result = _stage_of(directory, job_file, world, events, lambda: stop() or world.stop_asked(), stages)
    except Exception as error:
        logger.exception("job failed")
        return JobState.FAILED, world.blame(_explain(error))
    finally:
        events.close()
    if _was_stopped(result, events, asked=stop()):
        return JobState.CANCELLED, ""
    folder.write_json(directory / folder.RESULT_FILE, _as_json(result))
    return JobState.SUCCEEDED, ""


def _follow(directory: Path, stop: StopFlag, stages: Stages) -> int:
    """Runs the stage beside the lead, which owns the folder and records the job. Returns the exit status."""
    try:
        with _join(directory) as world:
            if world.hear().name == _BEGIN:
                _stage_of(directory, folder.read_job_file(directory), world, None, stop, stages)
    except Exception:
        logger.exception("rank failed")
        return EXIT_FAILED
    return 0


def _stage_of(
    directory: Path,
    job_file: folder.JobFile,
    world: World,
    listener: EventWriter | None,
    stop_requested: Callable[[], bool],
    stages: Stages,
) -> object:
    """What the stage returns."""
    # Imports torch, so not before it is sure that there is work.
    from steersman.trainer.stages.run import Run

    stage = stages[job_file.spec.kind]
    config = stage.load_config_class().model_validate(dict(job_file.spec.config))
    run_stage = stage.load_run()
    try:
        with Run(
            directory, run_id=job_file.job_id, listener=listener, stop_requested=stop_requested, world=world
        ) as run:
            return run_stage(config, run)
    except Exception as error:
        # Before this rank's connections close: the others would only say that they broke.
        world.blame(_explain(error))
        raise


def _local_handle() -> str:
    return process_handle(int(os.environ.get(ENV_PROCESS, os.getpid())))


def _state_of_failure() -> JobState:
    # On several nodes it may have failed because another one was lost: then all begin again, else the end of the pods
    # tells.
    return JobState.PENDING if int(os.environ.get(ENV_NODES, "1")) > 1 else JobState.FAILED


def _join(directory: Path) -> AbstractContextManager[World]:
    """The ranks that torchrun started; waits for all of them."""
    if launched_size() == 1:
        return nullcontext(SOLO)
    from steersman.trainer.distributed.ranks import Ranks

    return Ranks(on_standstill=lambda error: _record_standstill(directory, error))


def _record_standstill(directory: Path, error: str) -> None:
    """Records the failure on whatever rank found it: the lead may be the one that stands still."""
    job_file = folder.read_job_file(directory)
    store = JobStore(directory / job_file.database, journal=None)
    try:
        store.move(job_file.job_id, _state_of_failure(), error=error)
    except SteersmanError as refused:
        logger.warning("its end is recorded already: %s", refused)
    finally:
        store.close()


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _was_stopped(result: object, events: EventWriter, *, asked: bool) -> bool:
    """Whether a stage returned before its end. Asked to stop, it may have been there already."""
    stopped = getattr(result, "stopped", None)
    if isinstance(stopped, bool):
        return stopped
    last = events.last_progress
    return asked and not 0 < last.total_steps <= last.step


def _as_json(result: object) -> dict[str, object]:
    if is_dataclass(result) and not isinstance(result, type):
        return dict(json.loads(json.dumps(asdict(result), default=str)))
    return {}


def _explain(error: Exception) -> str:
    if not isinstance(error, SteersmanError):
        return f"{type(error).__name__}: {error}"
    if error.reason in (None, Reason.INTERNAL):
        return str(error)
    return error.message


if __name__ == "__main__":
    sys.exit(main())
