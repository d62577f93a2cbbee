"""One run: load, evaluate, train by forward passes, evaluate, and write down what happened."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import zokernels as zk
from zokernels.lab import files
from zokernels.lab.errors import RunError
from zokernels.lab.models import sharding
from zokernels.lab.runs import (
    answers,
    checkpoint,
    folder,
    hand_over,
    out_of_memory,
    processes,
    report,
    resume,
)
from zokernels.lab.runs.evaluate import evaluate
from zokernels.lab.runs.interrupt import stop_on_interrupt
from zokernels.lab.runs.prepare import prepare
from zokernels.lab.runs.state import Run
from zokernels.lab.runs.train import train
from zokernels.lab.tasks.task import Example


class Finetune(Run):
    """A run of ``settings``; ``run`` does all of it and returns the metrics."""

    def run(self) -> dict[str, Any]:
        """Trains and returns what ``metrics.json`` holds.

        Everything that could be refused is refused before anything is written.

        Raises:
            InputError: If the settings, the data or the model cannot be used.
            RunError: If losses stayed non-finite; the run folder is complete all the same. If
                the folder could not be written; then the run can be resumed.
        """
        s = self.settings
        with processes.started(s) as self.processes, ExitStack() as stack:
            if self.processes.first:
                reads = answers.read_by(s)
                held: Any = folder.RunFolder(s.out, s.overwrite, self.resume, reads)
            else:
                held = folder.Elsewhere(s.out)
            self.out = self.processes.together(lambda: stack.enter_context(held))
            order = self.processes.together(lambda: prepare(self))
            metrics = self._run(order)
            # None ends while another still wants something of it.
            self.processes.wait()
            return metrics

    def _run(self, order: Iterator[list[Example]]) -> dict[str, Any]:
        """What is left once everything is prepared."""
        out = self.settings.out
        try:
            resume.begin(self)
            self.trackers.begin()
            with stop_on_interrupt(self.stopped):
                if self.done == 0 or self.settings.evaluates_after(self.done):
                    evaluate(self, whole=self.done == 0)
                train(self, order)
                if self.optimizer.trajectory:
                    self.optimizer.trajectory.close()
                elif self.done < self.settings.steps:
                    checkpoint.save(self)
                self._pick()
                # Without a step the first evaluation is the last.
                if not self.processes.any(self.stopped.is_set()) and self.done > 0:
                    evaluate(self, whole=True)
                metrics = self._finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Interrupted at once, after {self.done} steps. Go on with: "
                f"zokernels finetune --resume {out}"
            ) from None
        except (OSError, zk.TrajectoryError) as error:
            reason = str(getattr(error, "strerror", None) or error).removesuffix(".")
            raise RunError(
                f"{out} could not be written: {reason}. "
                f"Make room, then go on with: zokernels finetune --resume {out}"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.is_out(error):
                raise
            raise RunError(
                f"Memory ran out in an evaluation ({out_of_memory.first_line(error)}), so the run "
                "stopped; its steps are in its log. Begin again with --retry-oom, or where there "
                f"is more memory go on with: zokernels finetune --resume {out}"
            ) from error
        finally:
            self.trackers.end()
            if self.optimizer.trajectory:
                with suppress(zk.TrajectoryError):
                    self.optimizer.trajectory.close()
        if self.failure:
            raise RunError(f"{self.failure} What was done is in {out}.")
        pushed = self.settings.push_to_hub and self.processes.first
        if pushed and not self.stopped.is_set():
            self.watcher.say(f"Uploaded: {hand_over.push(self, metrics)}")
        return metrics

    def _pick(self) -> None:
        """Goes back to the weights that were the best on valid, if those are kept."""
        if self.best is not None:
            self.learner.put(self.best[2])
            self.watcher.say(f"Kept the weights of step {self.best[1]}, the best on valid.")

    def _finish(self) -> dict[str, Any]:
        """Writes the weights and the report; returns the metrics."""
        save = self.settings.save_weights
        cut = save and self.processes.shard
        weights = sharding.whole(self.learner.model) if cut else None
        if not self.processes.first:
            return report.metrics(self)
        if save:
            keep = partial(self.learner.save, weights=weights)
            files.write_folder(self.out.path / folder.WEIGHTS, keep)
        metrics = report.write(self)
        if self.settings.save_weights:
            hand_over.save(self, metrics)
        if not self.stopped.is_set() and self.failure is None:
            (self.out.path / folder.CHECKPOINT).unlink(missing_ok=True)
        return metrics
