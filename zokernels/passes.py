"""The ops over parameters wherever they are and however they lie.

An op takes row-major tensors of one device. Here every device has a call of its own, and so has
each tensor in another order (channels_last, transposed): it goes as a row-major twin, one at a
time, whose values are copied back. No bit hangs on it, since an element's noise follows from its
place in the logical tensor; and whoever listens is told of one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from typing_extensions import Unpack

from zokernels import masks, ops
from zokernels.backends import checks, layouts, rules
from zokernels.backends.keywords import PassKeywords, RuleKeywords, takes

# A parameter and what goes with it: its states, or where the result goes.
Row = Sequence[torch.Tensor]
# The positions of the parameters of one call, and its keywords.
Call = tuple[Sequence[int], Any]


@takes(checks.numbers_of_pass)
def add_noise_(
    params: Sequence[torch.Tensor],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    **how: Unpack[PassKeywords],
) -> None:
    """`zokernels.ops.add_noise_`, of parameters on any devices and in any layout.

    Raises:
        ValueError: As there, and if parameters share memory; nothing is written.
    """

    def run(rows: Sequence[Row], how: Any) -> None:
        ops.add_noise_([p for (p,) in rows], seeds, coeffs, **how)

    _write([[p] for p in params], run, how)
    ops.tell("add_noise", params, seeds, coeffs, **how)


@takes(checks.numbers_of_pass)
def add_noise(
    params: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    **how: Unpack[PassKeywords],
) -> None:
    """`zokernels.ops.add_noise`, of parameters on any devices, and both lists in any layout."""
    rows = list(zip(params, out, strict=True))
    for chosen, own in _calls(rows, how):
        sources = [layouts.row_major(params[i]) for i in chosen]
        targets = [out[i] for i in chosen]
        made = [
            t if layouts.is_row_major(t) else torch.empty_like(p)
            for p, t in zip(sources, targets, strict=True)
        ]
        ops.add_noise(sources, made, seeds, coeffs, **own)
        _copy_back(zip(targets, made, strict=True))


@takes(checks.numbers_of_pass, rules.numbers)
def apply_update_(
    params: Sequence[torch.Tensor],
    states: Sequence[rules.State] | None,
    rule: str,
    seeds: Sequence[int],
    coeffs: Sequence[float],
    *,
    lr: float | Sequence[float],
    **how: Unpack[RuleKeywords],
) -> None:
    """`zokernels.ops.apply_update_`, of parameters on any devices and in any layout.

    Raises:
        ValueError: As there, and if parameters share memory; nothing is written.
    """
    names = rules.state_names(rule, how["amsgrad"])
    ordered = [rules.in_order(s, names, i) for i, s in enumerate(states or [()] * len(params))]

    def run(rows: Sequence[Row], how: Any) -> None:
        own = [list(with_it) for _, *with_it in rows]
        ops.apply_update_([p for p, *_ in rows], own, rule, seeds, coeffs, lr=lr, **how)

    _write([[p, *own] for p, own in zip(params, ordered, strict=True)], run, how)
    ops.tell(rule, params, seeds, coeffs, states=ordered, lr=lr, **how)


def _write(rows: Sequence[Row], run: Callable[[Sequence[Row], Any], None], how: Any) -> None:
    """Run a pass over rows that it writes, in as many calls as it takes."""
    calls = _calls(rows, how)
    with ops.listening(lambda *_: None):
        if len(calls) > 1 or not _is_plain(rows):
            layouts.check_apart({f"params[{i}]": row[0] for i, row in enumerate(rows)})
            # What one of the calls refuses is refused before another has written.
            with ops.taking(lambda *_: None):
                for chosen, own in calls:
                    run([[_blank(t) for t in rows[i]] for i in chosen], own)
        for chosen, own in calls:
            twins = [[layouts.row_major(t) for t in rows[i]] for i in chosen]
            run(twins, own)
            for i, row in zip(chosen, twins, strict=True):
                _copy_back(zip(rows[i], row, strict=True))


def _calls(rows: Sequence[Row], how: Any) -> list[Call]:
    """One for each device, and one for each row that needs a twin: no two are there at once."""
    found: list[Sequence[int]] = []
    for chosen in layouts.by_device([row[0] for row in rows]).values():
        plain = [i for i in chosen if _is_plain([rows[i]])]
        found += [plain] if plain else []
        found += [[i] for i in chosen if not _is_plain([rows[i]])]
    if len(found) < 2:
        return [(range(len(rows)), how)]
    return [(chosen, _for(chosen, how)) for chosen in found]


def _for(chosen: Sequence[int], how: Any) -> Any:
    """The keywords of a call over a part of the parameters."""

    def taken(name: str) -> Any:
        return how[name] and [how[name][i] for i in chosen]

    streams, mask = taken("streams") or list(chosen), masks.take(how["mask"], chosen)
    own = {name: taken(name) for name in ("offsets", "columns")}
    return {**how, **own, "streams": streams, "mask": mask}


def _is_plain(rows: Sequence[Row]) -> bool:
    return all(layouts.is_row_major(t) for row in rows for t in row)


def _blank(t: torch.Tensor) -> torch.Tensor:
    """What stands for a tensor where nothing is read: a twin's memory."""
    if layouts.is_row_major(t):
        return t
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _copy_back(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, values in pairs:
        if values is not target:
            target.detach().copy_(values.view_as(target))
