"""The loop: take batches, step, log, save, until the last step or a request to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from d2v_fast.data import Batch, DataError
from d2v_fast.diagnostics import CollapseError
from d2v_fast.train.build import Run
from d2v_fast.train.callbacks import CallbackError
from d2v_fast.train.guards import NotFiniteError, StopRequest, WorkerDied, disk_may_fail
from d2v_fast.train.log import log_end, log_start, open_logs
from d2v_fast.train.parallel import on_any
from d2v_fast.train.save import export, finish, reserve, save, save_description
from d2v_fast.train.step import step

INTERRUPTED = 130  # exit code of a run that was asked to stop and can be resumed


def loop(run: Run) -> int:
    """Train to the end or until asked to stop, then leave the folder; returns the exit code."""
    try:
        if run.accelerator.is_main_process:
            save_description(run)
            log_start(run)
        stopped = _steps(run)
        log_end(run, stopped)
    except BaseException as error:
        run.callbacks.end(run, error)
        raise
    else:
        run.callbacks.end(run, None)
        return INTERRUPTED if stopped else 0
    finally:
        run.folder.leave(run.state.done)


def _steps(run: Run) -> bool:
    """Train all steps; returns whether the run was asked to stop."""
    train, state, first, stop = run.config.train, run.state, run.state.done + 1, StopRequest()
    state.model.train()
    with _ending(run, stop) as end, stop, open_logs(run) as logs:
        run.callbacks.call("on_start", run)
        while state.done < run.steps:
            run.callbacks.written(run)
            part, number, last = run.turn()
            asked = stop.asked or run.asked_to_stop
            batches, failure = ([], None) if asked else _next_batches(run, part)
            flags = asked or stop.asked, run.checkpoints.busy, failure is not None
            end.stopped, busy, failed = on_any(run.accelerator, *flags)
            if end.stopped:
                break
            if failed:  # on any rank; all ranks join the save
                end.save()
                raise failure or DataError("another rank could not load its batches; its message gives the reason")
            busy = busy or finish(run)  # all ranks have written their parts of a sharded checkpoint
            if not busy and train.save_every and state.done // train.save_every > run.saved // train.save_every:
                save(run, wait=False)
            part.state.monitor.due = number % train.log_every == 0 or number in (1, last)
            outcome = step(part.state, batches)
            state.done = part.state.done
            part.feed.trained_on()
            logs.add(part, outcome, batches)
            run.callbacks.call("on_step", part, outcome)
            if part.state.monitor.due:
                logs.write(part, outcome, batches[-1]["epoch"])
            part.state.skipped.judge(state.done)
            if train.export_every and state.done % train.export_every == 0:
                with disk_may_fail("the export"):
                    _export(run)
            if state.done == first and train.save_every:
                reserve(run)
        end.save()
        run.callbacks.written(run)
    return end.stopped


@dataclass
class Ending:
    """How training ends.

    Attributes:
        run: The run.
        stopped: Whether it was asked to stop.
        together: Whether all ranks end after the same step, so that each can wait for the others.
    """

    run: Run
    stopped: bool = False
    together: bool = False

    def save(self) -> None:
        """Save a last checkpoint. Called on all ranks together."""
        save(self.run)
        self.together = True


@contextmanager
def _ending(run: Run, stop: StopRequest) -> Iterator[Ending]:
    """Save a checkpoint and the export, if possible, however training ends."""
    end = Ending(run)
    try:
        yield end
    except (CollapseError, NotFiniteError):  # raised on all ranks after the same step
        end.save()
        raise
    except CallbackError:
        if run.state.world == 1:  # other ranks do not see the error and would not join the save
            save(run)
        raise
    except WorkerDied:
        end.stopped = stop.asked  # the signal may have gone to the workers too
        if not end.stopped:
            raise
    finally:
        for part in run.each:
            part.feed.close()
        run.checkpoints.wait()
        # One rank alone cannot gather a sharded model.
        if run.state.done and (end.together or not run.config.train.shard):
            _export(run)
        if end.together:  # otherwise torchrun kills the first rank during the export once another has exited with an error
            run.accelerator.wait_for_everyone()


def _next_batches(run: Run, part: Run) -> tuple[list[Batch], Exception | None]:
    """The micro-batches of a step, or the error that loading them raised."""
    try:
        with part.window.waiting():
            return part.feed.take(run.config.train.accumulate), None
    except Exception as error:
        return [], error


def _export(run: Run) -> None:
    for part in run.each:
        part.state.done = run.state.done
        export(part)
