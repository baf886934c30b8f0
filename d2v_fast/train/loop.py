"""The loop: take batches, step, log, save, until the last step or a request to stop."""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import ExitStack

from d2v_fast.checkpoint import CheckpointError, write_text
from d2v_fast.data import Batch, DataError
from d2v_fast.diagnostics import CollapseError, distinct_share, environment
from d2v_fast.encoders import describe
from d2v_fast.train.build import Run, trains_tokenizer
from d2v_fast.train.callbacks import CallbackError
from d2v_fast.train.folder import TOKENIZER
from d2v_fast.train.guards import NotFiniteError, StopRequest, WorkerDied, disk_may_fail
from d2v_fast.train.log import Progress, RunLog, make_record
from d2v_fast.train.parallel import on_any
from d2v_fast.train.save import export, finish, reserve, save, write_settings
from d2v_fast.train.step import step

log = logging.getLogger(__name__)

INTERRUPTED = 130  # exit code of a run that was asked to stop and can be resumed
SUMMARY = (
    "step {step}: loss {loss:.4f}, target std {target_std:.3f}, prediction std {prediction_std:.3f}, "
    "feature std {feature_std:.3f}; student in {folder}"
)


def loop(run: Run) -> int:
    """Train to the end or until asked to stop, then leave the folder; returns the exit code."""
    try:
        if run.accelerator.is_main_process:
            _describe(run)
        code = _log_end(run, _steps(run))
    except BaseException as error:
        run.callbacks.end(run, error)
        raise
    else:
        run.callbacks.end(run, None)
        return code
    finally:
        run.folder.leave(run.state.done)


def _steps(run: Run) -> bool:
    """Train all steps; returns whether the run was asked to stop."""
    train, state, main, begin = run.config.train, run.state, run.accelerator.is_main_process, run.state.done
    stopped, together = False, False
    state.model.train()
    try:
        with StopRequest() as stop, ExitStack() as logs, Progress(run.steps, begin, main) as progress:
            lines = {}
            for part in run.each:
                opened = RunLog(part.folder.path if main else None, begin, "tensorboard" not in train.trackers)
                lines[part.name] = logs.enter_context(opened)
                part.state.monitor.judge({"step": begin, "distinct_samples": distinct_share(part.data)})
            run.callbacks.call("on_start", run)
            while state.done < run.steps:
                run.callbacks.written(run)
                part, number, last = run.turn()
                asked = stop.asked or any(each.stop for each in (run, *run.each))
                batches, failure = ([], None) if asked else _next_batches(run, part)
                stopped, busy, failed = on_any(run.accelerator, asked or stop.asked, run.checkpoints.busy, failure is not None)
                if stopped:
                    break
                if failed:  # the other ranks learn of it here and join the save
                    save(run)
                    together = True
                    raise failure or DataError("another rank could not load its batches; its message gives the reason")
                busy = busy or finish(run)  # all ranks have written their parts of a sharded checkpoint
                if not busy and train.save_every and state.done // train.save_every > run.saved // train.save_every:
                    save(run, wait=False)
                part.state.monitor.due = number % train.log_every == 0 or number in (1, last)
                outcome = step(part.state, batches)
                state.done = part.state.done
                part.feed.trained_on()
                part.window.add(outcome, sum(len(batch["samples"]) for batch in batches))
                progress.step()
                run.callbacks.call("on_step", part, outcome)
                if part.state.monitor.due:
                    record = make_record(part.state, part.window, part.broken, batches[-1]["epoch"], outcome.grad_norm)
                    part.record = record
                    part.window.clear()
                    run.callbacks.call("on_log", part, record)
                    lines[part.name].write(record)
                    progress.show(record, part.name)
                    part.state.monitor.judge(record)
                part.state.skipped.judge(state.done)
                if train.export_every and state.done % train.export_every == 0:
                    with disk_may_fail("the export"):
                        _export(run)
                if train.save_every and state.done == begin + 1:
                    reserve(run)
            save(run)
            together = True
            run.callbacks.written(run)
    except (CollapseError, NotFiniteError):  # raised on all ranks after the same step
        save(run)
        together = True
        raise
    except CallbackError:
        if state.world == 1:  # other ranks do not see the error and would not join the save
            save(run)
        raise
    except WorkerDied:
        stopped = stop.asked  # the signal may have gone to the workers too
        if not stopped:
            raise
    finally:
        for part in run.each:
            part.feed.close()
        run.checkpoints.wait()
        # Keep what was learned, whatever ended the run. One rank alone cannot gather a sharded model.
        if state.done and (together or not train.shard):
            _export(run)
        if together:  # else torchrun would end the first rank during the export, once another has exited with an error
            run.accelerator.wait_for_everyone()
    return stopped


def _export(run: Run) -> None:
    for part in run.each:
        part.state.done = run.state.done
        export(part)


def _next_batches(run: Run, part: Run) -> tuple[list[Batch], Exception | None]:
    """The micro-batches of a step, or the error that loading them raised."""
    try:
        with part.window.waiting():
            return part.feed.take(run.config.train.accumulate), None
    except Exception as error:
        return [], error


def _describe(run: Run) -> None:
    """Describe the run in its folder and in the log."""
    config, folder, world = run.config, run.folder.path, run.state.world
    if not run.changed:
        write_settings(run)
    write_text(folder / "environment.json", json.dumps(environment(folder), indent=1))
    for part in run.each:
        _describe_part(part)
    where = f"{config.train.precision} on {run.state.device}" + (f" × {world}" if world > 1 else "")
    samples = " + ".join("streamed" if part.data.stream else f"{len(part.data)}" for part in run.each)
    log.info("%s samples, %d steps, %s, run in %s", samples, run.steps, where, folder)
    if run.fused:
        log.info("fused: %s", ", ".join([*run.fused, *(["AdamW"] if config.optimizer.kind == "adamw" else [])]))
    if done := run.state.done:
        log.info("resumes after step %d%s", done, "; nothing is left to train" * (done >= run.steps))


def _describe_part(run: Run) -> None:
    """Save the tokenizer that was trained for the run, and log the encoder."""
    target = run.folder.path / TOKENIZER
    if trains_tokenizer(run.config) and not (run.config.resume and target.exists()):
        temporary = target.with_suffix(".tmp")
        for unfinished in (temporary, target):  # of a run that ended before its first step
            shutil.rmtree(unfinished, ignore_errors=True)
        run.data.processor(run.state.core.student).save_pretrained(temporary)
        os.replace(temporary, target)
    log.info("%s%s", run.name and f"{run.name}: ", describe(run.state.core.student))


def _log_end(run: Run, stopped: bool) -> int:
    """Log how the run ended; returns the exit code.

    Raises:
        CheckpointError: The last checkpoint could not be written.
    """
    done, folder = run.state.done, run.folder.path
    students = " and ".join(str(part.folder.path / "export") for part in run.each)
    for part in run.each:
        if run.accelerator.is_main_process and part.record:
            title = f"{part.name}, " if part.name else ""
            log.info(title + SUMMARY.format(folder=part.folder.path / "export", **part.record))
    if run.checkpoints.failed:
        raise CheckpointError(f"{run.checkpoints.failed}; the student is in {students}")
    if stopped and not done:
        log.warning("stopped before the first step; there is nothing to resume")
    elif stopped:
        log.warning(
            "stopped at step %d of %d; the student so far is in %s; d2v-train --resume %s continues",
            *(done, run.steps, students, folder),
        )
    return INTERRUPTED if stopped else 0
