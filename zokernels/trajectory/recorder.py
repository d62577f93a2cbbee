"""What an optimizer's passes were, turned into records as they happen."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from zokernels import masks, noise, ops
from zokernels.estimators import ROUNDING, derive_seed
from zokernels.trajectory import checksum as checksums
from zokernels.trajectory import format as form
from zokernels.trajectory.format import Scalars, Step, TrajectoryError
from zokernels.trajectory.reader import Trajectory
from zokernels.trajectory.writer import Nowhere, Writer

Named = Sequence[tuple[str, torch.Tensor, int]]
OnDisk = Callable[[Callable[[], Writer]], Writer | None]


class Recorder:
    """Notes the passes of each step, and appends them when the step is done.

    Args:
        writer: Where the records go.
        seed: The run's seed, from which a reader derives what is not recorded.
        named: Name, tensor and stream of each parameter, in the header's order.
        following: Number of the step that is recorded next.
        passes: Descriptions that the file holds already.
    """

    def __init__(
        self, writer: Writer, seed: int, named: Named, following: int, passes: Sequence[dict] = ()
    ):
        self.path = writer.path
        self._writer = writer
        self._seed = seed
        self._tensors = [p for _, p, _ in named]
        self._streams = [stream for _, _, stream in named]
        self._following = following
        self._begun_with = [(name, checksums.shape(p), p.dtype) for name, p, _ in named]
        self._places = {id(p): i for i, p in enumerate(self._tensors)}
        self._wide = _is_wide(self._tensors)
        self._known: dict[Any, int] = {}
        self._described = [_identity(d) for d in passes]
        self._noted: list[Scalars] = []
        self._fresh: list[dict] = []
        self._mask_seeds: list[int | None] = [_mask_seed(d["mask"]) for d in passes]
        self._broken: str | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        named: Named,
        *,
        optimizer: str,
        groups: list[dict],
        seed: int,
        first: int = 0,
        replayable: bool = True,
        about: dict[str, Any] | None = None,
        sync_every: float = 1.0,
        on_disk: OnDisk = lambda open_file: open_file(),
    ) -> Recorder:
        """Starts a file.

        Args:
            path: It may not exist.
            named: Name, tensor and stream of each parameter; all weights are read, for their
                checksums.
            optimizer: The optimizer's class.
            groups: The constant numbers of its param groups.
            seed: The run's seed.
            first: Number of the first step.
            replayable: Whether the passes are all that changes the weights.
            about: What else a reader should know, as JSON can say it.
            sync_every: As for `Writer`.
            on_disk: Opens the file by the function it is given; or does not, and gives None, where
                another process has the file.

        Raises:
            TrajectoryError: If the file exists or cannot be written, or a trained parameter is of a
                kind that no pass can write.
        """
        parameters = [_described(name, p, stream) for name, p, stream in named]
        header = {
            "version": form.VERSION,
            "noise": noise.VERSION,
            "optimizer": optimizer,
            "replayable": replayable,
            "seed": seed,
            "first": first,
            "numbers": "binary64" if _is_wide([p for _, p, _ in named]) else "binary32",
            "groups": groups,
            "about": about or {},
            "parameters": parameters,
        }
        packed = form.pack_json(header)
        # Where warnings are errors nothing has been begun yet.
        if unknown := [p["name"] for p in parameters if p["check"] is None]:
            names = ", ".join(unknown[:3])
            if others := len(unknown[3:]):
                names += f" and {others} others"
            warnings.warn(
                f"{path} has no checksum of {names}, whose numbers cannot be read, so that a "
                "replay does not tell whether the base model has the same ones.",
                stacklevel=4,
            )
        writer = on_disk(lambda: Writer.create(Path(path), packed, sync_every))
        return cls(writer or Nowhere(Path(path)), seed, named, first)

    @classmethod
    def reopen(
        cls,
        trajectory: Trajectory,
        step: int,
        named: Named,
        sync_every: float = 1.0,
        on_disk: OnDisk = lambda open_file: open_file(),
    ) -> Recorder:
        """Goes on with a file after so many steps; the records behind them are cut off."""
        size, check, described = trajectory.mark(step)
        path = trajectory.path
        whole = trajectory.size
        writer = on_disk(lambda: Writer.reopen(path, size, check, whole, sync_every))
        writer = writer or Nowhere(path)
        return cls(writer, trajectory.header["seed"], named, step, trajectory.passes[:described])

    def check(self, joined: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Refuse weights that the log can't know, before a step is made with them.

        Args:
            joined: The parameters that take the place of others, by name.

        Raises:
            TrajectoryError: Naming one that is new to the log, or has another shape than it had.
        """
        changed = [(n, "replaced") for n, p in joined if id(p) not in self._places]
        changed += [
            (name, f"resized from {tuple(shape)} to {tuple(p.shape)}")
            for p, (name, shape, _) in zip(self._tensors, self._begun_with, strict=True)
            if checksums.shape(p) != shape
        ]
        changed += [
            (name, f"turned from {dtype} to {p.dtype}")
            for p, (name, _, dtype) in zip(self._tensors, self._begun_with, strict=True)
            if p.dtype is not dtype
        ]
        for name, what in changed:
            raise TrajectoryError(
                f"Parameter {name!r} was {what} after the trajectory {self.path} was begun, so "
                "that a replay could not make its weights; begin a new one: opt.record(PATH)."
            )

    def begin(self, step: int) -> None:
        """A step begins.

        Raises:
            TrajectoryError: If an earlier step was left half done.
        """
        if self._noted and not self._broken:
            # A block-wise step was left by an exception in the forward of a later block.
            self._break(step, "an exception between its updates")
        if self._broken:
            raise TrajectoryError(self._broken)
        if step != self._following:
            raise TrajectoryError(
                f"Step {step} can't follow in the trajectory {self.path}, whose next is step "
                f"{self._following}: the optimizer was taken to another step (load_state_dict). "
                "Begin a new one, opt.record(PATH), or go back in this one by a new optimizer and "
                f"opt.resume(PATH, until={step})."
            )

    def _break(self, step: int, what: str) -> None:
        self._broken = (
            f"Step {step} of the trajectory {self.path} was left half done by {what}, so the "
            "weights are no longer what it says; load the model again and resume from it."
        )

    @contextlib.contextmanager
    def listening(self, step: int) -> Iterator[None]:
        """Notes what passes the block makes; `write` then records them."""
        try:
            with ops.listening(lambda *call: self._noted.append(self._scalars(step, *call))):
                yield
        except BaseException as error:
            # These two are raised before a weight is written; what is said of a pass, after it.
            refused = isinstance(error, ValueError | TypeError)
            if self._noted or not refused or isinstance(error, TrajectoryError):
                self._break(step, type(error).__name__)
            raise

    def write(self, step: int, skipped: bool = False, moments: form.Moments = ()) -> None:
        """Records the step that was listened to.

        Args:
            step: Its number.
            skipped: If its loss was not finite. A block-wise step may have updated some blocks
                before.
            moments: The optimizer's running means after it.

        Raises:
            TrajectoryError: If the file cannot take it. The record is kept for the next time.
        """
        if self._broken:
            raise TrajectoryError(self._broken)
        frames = [(form.PASS, form.pack_json(described)) for described in self._fresh]
        if skipped and not self._noted:
            frames.append((form.SKIP, form.pack_skip(step)))
        else:
            if moments:
                frames.append((form.MOMENTS, form.pack_moments(moments)))
            record = form.pack_step(Step(step, tuple(self._noted)), self._wide)
            frames.append((form.STEP, record))
        self._fresh, self._noted = [], []
        self._following = step + 1
        self._writer.append(frames)

    def close(self) -> None:
        """Syncs and closes the file.

        Raises:
            TrajectoryError: If what was recorded cannot be brought to the disk.
        """
        self._writer.close()

    def _scalars(
        self,
        step: int,
        rule: str,
        params: Sequence[torch.Tensor],
        seeds: Sequence[int],
        coeffs: Sequence[float],
        options: dict[str, Any],
    ) -> Scalars:
        self._check_own(params, options)
        of = self._describe(rule, params, options)
        own = [derive_seed(self._seed, step, k) for k in range(len(seeds))]
        rounding_seed = options["rounding_seed"]
        if rounding_seed == derive_seed(self._seed, step, 0, ROUNDING):
            rounding_seed = None
        mask_seed = _mask_seed(masks.to_plain(options["mask"]))
        return Scalars(
            of=of,
            decay=options["decay"],
            coeffs=tuple(coeffs),
            lr=options.get("lr"),
            count=options.get("step"),
            seeds=None if list(seeds) == own else tuple(seeds),
            rounding_seed=rounding_seed,
            mask_seed=None if mask_seed == self._mask_seeds[of] else mask_seed,
        )

    def _check_own(self, params: Sequence[torch.Tensor], options: dict[str, Any]) -> None:
        """Raise unless a replay would give the pass the same places, streams and columns."""
        streams = options["streams"] or range(len(params))
        columns = options["columns"] or [None] * len(params)
        if (
            options["offsets"] is not None
            or options["each_step"]
            or list(streams) != [self._streams[self._place(p)] for p in params]
            or any(
                c not in (None, noise.columns_of(p.shape))
                for p, c in zip(params, columns, strict=True)
            )
        ):
            raise TrajectoryError(
                "A pass over shards or several steps, or with streams or columns that are not its "
                "parameters' own, was made in one optimizer step, which a trajectory cannot "
                "record; pass whole parameters, one step at a time."
            )

    def _describe(self, rule: str, params: Sequence[torch.Tensor], options: dict[str, Any]) -> int:
        """The number of the description that fits the pass; a new one where none does."""
        mask = masks.to_plain(options["mask"])
        single = _mask_seed(mask) is not None
        frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in (mask or {}).items()}
        numbers = {k: options[k] for k in ("beta", "betas", "adam_eps", "amsgrad") if k in options}
        key = (
            rule, tuple(map(id, params)), options["dist"], options["rounding"],
            tuple((k, v) for k, v in frozen.items() if not (single and k == "seed")),
            tuple(numbers.items()),
        )  # fmt: skip
        if key in self._known:
            return self._known[key]
        described = {
            "rule": rule,
            "parameters": [self._place(p) for p in params],
            "dist": options["dist"],
            "rounding": options["rounding"],
            "mask": mask,
            "numbers": numbers,
            "states": [[_dtype(t) for t in state] for state in options.get("states", [])],
        }
        # A resumed run finds its descriptions in the file.
        if (identity := _identity(described)) not in self._described:
            self._fresh.append(described)
            self._described.append(identity)
            self._mask_seeds.append(_mask_seed(mask))
        self._known[key] = self._described.index(identity)
        return self._known[key]

    def _place(self, p: torch.Tensor) -> int:
        try:
            return self._places[id(p)]
        except KeyError:
            raise TrajectoryError(
                f"A parameter of shape {tuple(p.shape)} joined the optimizer after the trajectory "
                f"{self.path} was begun; begin a new one."
            ) from None


def _described(name: str, p: torch.Tensor, stream: int) -> dict[str, Any]:
    """A parameter as the header has it."""
    if is_lazy(p):
        raise TrajectoryError(
            f"Parameter {name!r} has no shape yet, since its lazy module has not run; run the "
            "model on one batch, then make the optimizer and record."
        )
    if p.requires_grad and (kind := checksums.kind(p)) is not None:
        raise TrajectoryError(
            f"Parameter {name!r} is trained and is {kind}, which the passes of a replay cannot "
            "write; freeze it (requires_grad_(False)) and train dense weights, such as an "
            "adapter's, or do not record."
        )
    return {
        "name": name,
        "shape": checksums.shape(p),
        "dtype": _dtype(p),
        "stream": stream,
        "check": checksums.checksum(p),
    }


def check_recordable(mask: dict | None) -> None:
    """Raise unless a param group's mask is one of numbers.

    Raises:
        TrajectoryError: If it holds a bit for every weight.
    """
    if mask is not None and mask["kind"] == "bits":
        raise TrajectoryError(
            "The optimizer has a mask of a bit a weight (Bits), which a log of scalars cannot "
            "hold; use Random or Magnitude, or do not record."
        )


def _mask_seed(mask: dict | None) -> int | None:
    """The seed of a random mask with one seed for all tensors."""
    seed = (mask or {}).get("seed")
    return seed if isinstance(seed, int) else None


def _identity(described: dict) -> bytes:
    """The description as a file holds it, less the mask's seed, which is a step's own number."""
    mask = described["mask"]
    if _mask_seed(mask) is not None:
        mask = {**mask, "seed": 0}
    return form.pack_json({**described, "mask": mask})


def _is_wide(tensors: Sequence[torch.Tensor]) -> bool:
    return any(t.dtype is torch.float64 for t in tensors)


def _dtype(t: torch.Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
