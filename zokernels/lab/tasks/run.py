"""One run: load, evaluate, train by forward passes, evaluate, and write down what happened."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import zokernels as zk
from zokernels.distributed import launched
from zokernels.lab.tasks import (
    chat,
    checkpoint,
    data,
    evaluate,
    folder,
    get_task,
    halves,
    models,
    optimizers,
    report,
    resume,
    schemes,
)
from zokernels.lab.tasks.batches import batches
from zokernels.lab.tasks.errors import InputError, RunError
from zokernels.lab.tasks.history import History, Watcher
from zokernels.lab.tasks.interrupt import stop_on_interrupt
from zokernels.lab.tasks.probe import ProbeScorer
from zokernels.lab.tasks.scoring import SCORERS, Scorer
from zokernels.lab.tasks.settings import Settings
from zokernels.lab.tasks.task import Task

_MAX_BAD_STEPS = 10
_OPTIMIZER_OPTIONS = (
    "lr eps num_queries two_sided dist sparsity resample_every blocks block_order rounding "
    "weight_decay seed perturb backend hybrid_split fo_lr fo_optimizer".split()
)


class Finetune:
    """A run of ``settings``; ``run`` does all of it and returns the metrics.

    Args:
        settings: What to do.
        watcher: Whom to tell.
        command: The command line, for the report.
        resume: Go on with the run in the folder ``settings.out``, where it was left.
    """

    def __init__(
        self,
        settings: Settings,
        watcher: Watcher | None = None,
        command: str = "",
        resume: bool = False,
    ) -> None:
        self.settings = settings
        self.watcher = watcher or Watcher()
        self.command = command
        self.history = History()
        self.stopped = threading.Event()
        self.resume = resume
        # Seconds of the steps that an earlier process did.
        self.earlier = 0.0
        self._pool = 0
        self._started = time.perf_counter()
        self.best: tuple[float, int, list[torch.Tensor]] | None = None

    def run(self) -> dict[str, Any]:
        """Trains and returns what ``metrics.json`` holds.

        Everything that could be refused is refused before anything is written.

        Raises:
            InputError: If the settings, the data or the model cannot be used.
            RunError: If losses stayed non-finite; the run folder is complete all the same. If
                the folder could not be written; then the run can be resumed.
        """
        s = self.settings
        s.check()
        if launched() > 1:
            raise InputError(
                f"torchrun started {launched()} processes, but finetune runs in one; start it "
                "without torchrun, or train on several with ZOTrainer or a loop of your own."
            )
        optimizers.check(s.optimizer, asdict(s))
        task = get_task(s.task).with_template(s.template)
        out = folder.RunFolder(s.out, s.overwrite, self.resume)
        self.splits = data.load(task, s.data)
        if s.shots:
            self.splits = data.few(self.splits, s.shots, s.seed)
        pool = data.by_words(self.splits.train, s.min_words, s.max_words)
        order = batches(
            pool, s.batch_size, seed=s.seed, balanced=s.balanced, classes=len(task.words) or 2
        )
        self.load()
        scorer = self._scorer(task)
        optimizer = self._optimizer()
        for note in (*self.splits.notes, *self.loaded.notes):
            self.watcher.say(note)
        self.watcher.say(self._overview(len(pool)))
        failure = None
        try:
            self._pool = resume.fingerprint(pool)
            done = self._begin(optimizer, out)
            with stop_on_interrupt(self.stopped):
                if done == 0 or (s.eval_every and done % s.eval_every == 0 and done < s.steps):
                    self._evaluate(scorer, out, done, whole=done == 0)
                done, failure = self._train(scorer, optimizer, order, out, done)
                if optimizer.trajectory:
                    optimizer.trajectory.close()
                elif done < s.steps:
                    checkpoint.save(self, optimizer, out.path / folder.CHECKPOINT, done, self._pool)
                self._restore_best()
                if not self.stopped.is_set():
                    self._evaluate(scorer, out, done, whole=True)
                metrics = self._finish(out, done, failure)
        except (OSError, zk.TrajectoryError) as error:
            raise RunError(
                f"{s.out} could not be written: {getattr(error, 'strerror', None) or error} "
                f"Make room, then go on with: zokernels finetune --resume {s.out}"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if not halves.is_out_of_memory(error):
                raise
            raise RunError(
                f"Memory ran out in an evaluation ({_first_line(error)}), so the run stopped; its "
                "steps are in its log. Begin again with --retry-oom, or where there is more "
                f"memory go on with: zokernels finetune --resume {s.out}"
            ) from error
        finally:
            out.close()
            if optimizer.trajectory:
                with suppress(zk.TrajectoryError):
                    optimizer.trajectory.close()
        if failure:
            raise RunError(f"{failure} What was done is in {s.out}.")
        return metrics

    def load(self) -> None:
        """Loads the model as every run of these settings begins with it.

        Raises:
            InputError: If it cannot be had, or the device or the scheme do not fit it.
        """
        s = self.settings
        # Tensors that a checkpoint lacks start random, and must start the same on a resume.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            self.loaded = models.load(s.model, s.dtype)
        try:
            model = self.loaded.model.to(s.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--device {s.device} cannot hold the model: {reason}") from None
        self.model, self.trained = schemes.apply(
            model, s.scheme, s.train_only, s.seed, len(get_task(s.task).words)
        )

    def _begin(self, optimizer: Any, out: folder.RunFolder) -> int:
        """Starts the logs, or goes on with them: the number of steps that are done already."""
        settings = _plain(asdict(self.settings))
        if not optimizer.replayable:
            if self.resume and (out.path / folder.CHECKPOINT).exists():
                return checkpoint.restore(self, optimizer, out, self._pool)
            out.begin(settings)
            return 0
        about = {"settings": settings, "pool": self._pool}
        if self.resume and (out.path / folder.TRAJECTORY).exists():
            return resume.restore(self, optimizer, out, about)
        out.begin(settings)
        optimizer.record(out.path / folder.TRAJECTORY, about=about)
        return 0

    def _optimizer(self) -> Any:
        s = self.settings
        states = zk.backends()
        if s.backend is not None and s.backend not in states:
            raise InputError(f"--backend must be one of {', '.join(states)}, got '{s.backend}'.")
        if s.backend is not None and not states[s.backend].available:
            raise InputError(f"--backend {s.backend} is not there: {states[s.backend].reason}")
        options = {name: getattr(s, name) for name in _OPTIMIZER_OPTIONS}
        options["max_bad_steps"] = _MAX_BAD_STEPS
        return optimizers.build(s.optimizer, self.model, options)

    def _scorer(self, task: Task) -> Scorer:
        s = self.settings
        demos = data.part(self.splits.train, s.demos) if s.demos else []
        common = (self.model, self.loaded.tokenizer, task, s.max_length, s.objective, demos)
        scorer = (
            ProbeScorer(*common, kind=self.loaded.kind)
            if s.scheme == "probe"
            else SCORERS[self.loaded.kind](*common)
        )
        if s.chat:
            scorer.chat = chat.form(self.loaded.tokenizer, s.model, self.loaded.kind)
        return scorer

    def _overview(self, pool: int) -> str:
        s, t = self.settings, self.trained
        return (
            f"Data: {self.splits.source}, {pool:,} training {self._examples()} and "
            f"{len(self.splits.dev):,} dev. Model: {s.title} as {report.KINDS[self.loaded.kind]}, "
            f"training {t.weights:,} of {t.of:,} weights."
        )

    def _train(
        self,
        scorer: Scorer,
        optimizer: Any,
        order: Iterator[list[Any]],
        out: folder.RunFolder,
        done: int,
    ) -> tuple[int, str | None]:
        """Steps until done, stopped, or failed: the number of steps, and why it failed."""
        s = self.settings
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda n: s.factor(n + done))
            for o in (optimizer, getattr(optimizer, "fo_optimizer", None))
            if o is not None
        ]
        for _ in range(done):
            next(order)
        for step in range(done + 1, s.steps + 1):
            if self.stopped.is_set():
                return step - 1, None
            batch = next(order)
            lr = float(schedules[0].get_last_lr()[0])
            try:
                loss, halved = halves.take_step(
                    optimizer, scorer, batch, s.retry_oom, self.history.count
                )
            except (RuntimeError, FloatingPointError, MemoryError) as error:
                return step - 1, self._why(step, error)
            if halved and not self.history.halved:
                self.watcher.say(
                    f"Step {step}: a batch of {len(batch)} did not fit in memory, so its forwards "
                    "ran as two halves; further such steps are marked in the log."
                )
            for schedule in schedules:
                schedule.step()
            self._record(out, optimizer, step, loss, lr, halved)
            if s.eval_every and step % s.eval_every == 0 and step < s.steps:
                if not optimizer.trajectory:
                    checkpoint.save(self, optimizer, out.path / folder.CHECKPOINT, step, self._pool)
                self._evaluate(scorer, out, step, whole=False)
        return s.steps, None

    def _why(self, step: int, error: BaseException) -> str:
        if not halves.is_out_of_memory(error):
            return str(error)
        s, lower = self.settings, "lower --batch-size or --max-length"
        if s.retry_oom:
            tried = f"a batch of {s.batch_size}, and with halves of it, too"
        else:
            tried = f"a batch of {s.batch_size}"
            lower += ", or pass --retry-oom, which halves a batch that does not fit"
        return f"Step {step} ran out of memory with {tried} ({_first_line(error)}); {lower}."

    def _record(
        self,
        out: folder.RunFolder,
        optimizer: Any,
        step: int,
        loss: float,
        lr: float,
        halved: bool,
    ) -> None:
        timing = optimizer.timing
        for part in self.history.seconds:
            self.history.seconds[part] += getattr(timing, part)
        self.history.losses.append(loss)
        self.history.halved += halved
        slopes = [d if math.isfinite(d) else None for d in optimizer.projected_gradients]
        record = {
            "step": step,
            "loss": loss if math.isfinite(loss) else None,
            "finite": math.isfinite(loss) and None not in slopes,
            "lr": lr,
            "halved": halved,
            "projected_gradients": slopes,
            "seconds": round(timing.total, 6),
            "outside_forwards": round(1 - timing.forwards / timing.total, 4),
            "parts": {
                part: round(getattr(timing, part), 6)
                for part in ("forwards", "backward", "noise", "update")
            },
            "forwards": self.history.forwards,
            "backwards": self.history.backwards,
        }
        out.log(record)
        self.watcher.step(step, loss, timing.total, timing.total - timing.forwards)

    def _evaluate(self, scorer: Scorer, out: folder.RunFolder, step: int, whole: bool) -> None:
        """Measures dev, and on the way also valid if a checkpoint will be picked by it."""
        s = self.settings
        count = None if whole else s.eval_examples
        try:
            dev = data.part(self.splits.dev, count)
            self._measure("dev", scorer, dev, out, step)
            if s.keep_best and not whole:
                valid = data.part(self.splits.valid, count)
                found = self._measure("valid", scorer, valid, out, step)
                if self.best is None or found.value > self.best[0]:
                    weights = [p.detach().clone() for p in self.trainable()]
                    self.best = (found.value, step, weights)
        except evaluate.Interrupted:
            return

    def _measure(
        self, split: str, scorer: Scorer, examples: list[Any], out: folder.RunFolder, step: int
    ) -> evaluate.Accuracy:
        began = time.perf_counter()
        found = evaluate.accuracy(
            scorer,
            examples,
            stop=self.stopped.is_set,
            calibrate=self.settings.calibrate,
            retry_oom=self.settings.retry_oom,
        )
        getattr(self.history, split).append((step, found))
        seconds = round(time.perf_counter() - began, 3)
        out.log(
            {
                "step": step,
                "split": split,
                "accuracy": found.value,
                "standard_error": found.error,
                "examples": found.examples,
                "seconds": seconds,
            }
        )
        self.watcher.say(
            f"Step {step}: {split} {scorer.task.metric} {found.value:.1%} ± {found.error:.1%} "
            f"({found.examples:,} {self._examples()}, {seconds:.1f} s)."
        )
        return found

    def _examples(self) -> str:
        return "sentences" if get_task(self.settings.task).fields == ("sentence",) else "examples"

    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters that the run changes."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def _restore_best(self) -> None:
        if self.best is None:
            return
        with torch.no_grad():
            for parameter, kept in zip(self.trainable(), self.best[2], strict=True):
                parameter.copy_(kept)
        self.watcher.say(f"Kept the weights of step {self.best[1]}, the best on valid.")

    def save(self, path: Path) -> None:
        """Writes the model, or its adapter, and the tokenizer into a folder."""
        self.model.save_pretrained(path)
        self.loaded.tokenizer.save_pretrained(path)

    def _finish(self, out: folder.RunFolder, done: int, failure: str | None) -> dict[str, Any]:
        if self.settings.save_weights:
            folder.write_folder(out.path / folder.WEIGHTS, self.save)
        seconds = time.perf_counter() - self._started + self.earlier
        metrics = report.metrics(self, done, failure, seconds)
        metrics["weights_of_step"] = self.best[1] if self.best else done
        report.plot(self.history, out.path / folder.PLOT, self.settings)
        folder.write_text(out.path / folder.REPORT, report.text(self, metrics))
        # Last, since a run with metrics is finished.
        folder.write_json(out.path / folder.METRICS, metrics)
        if not self.stopped.is_set() and failure is None:
            (out.path / folder.CHECKPOINT).unlink(missing_ok=True)
        return metrics


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in values.items()}
