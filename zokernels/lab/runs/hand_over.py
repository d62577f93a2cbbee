"""What others get of a run: the line that loads it, merged weights, a model card, the hub."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from zokernels.lab import files
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.models import gguf_file, packages
from zokernels.lab.models.loading import FACTORIES
from zokernels.lab.models.schemes import ADAPTERS
from zokernels.lab.runs import folder
from zokernels.lab.runs.history import brief
from zokernels.lab.runs.optimizers import FIRST_ORDER, HYBRID, key
from zokernels.lab.runs.settings import Settings
from zokernels.lab.runs.state import Run
from zokernels.lab.tasks.metric import METRICS

CARD = "README.md"
_PROJECT = "zokernels"
_HOME = f"https://pypi.org/project/{_PROJECT}/"


def check(s: Settings) -> None:
    """Refuses, before a run begins, what could not be handed over at its end.

    Raises:
        InputError: Naming the option and what to do.
    """
    if s.merge and s.scheme != "lora":
        raise InputError(f"--merge joins an adapter of --scheme lora to its base; got {s.scheme}.")
    if s.merge and not s.save_weights:
        raise InputError("--merge writes weights, and --no-save-weights keeps none; leave one out.")
    if s.push_to_hub is None:
        return
    if not s.save_weights:
        raise InputError("--push-to-hub needs the weights; leave out --no-save-weights.")
    if s.scheme == "probe":
        raise InputError(
            "--push-to-hub: a probe is no model that others can load; keep its folder."
        )
    try:
        import huggingface_hub as hub
    except ImportError:
        raise InputError(
            "--push-to-hub needs huggingface_hub, which is not installed: "
            "pip install 'zokernels[hf]'."
        ) from None
    try:
        hub.utils.validate_repo_id(s.push_to_hub)
        hub.HfApi().whoami()
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--push-to-hub {s.push_to_hub}: the hub does not take it ({reason}); log in with "
            "hf auth login, or set HF_TOKEN, and name it OWNER/NAME."
        ) from None


def code(run: Run, place: str | None = None) -> str:
    """Python that loads what the run saved.

    Args:
        run: The run.
        place: Where it is, a folder or a name on the hub; None: in the run's folder.
    """
    s, kind = run.settings, run.learner.loaded.kind
    where = repr(place or str(s.out / folder.WEIGHTS))
    factory = FACTORIES[kind]
    if s.scheme == "probe":
        return f"# zokernels predict {s.out} ROWS"
    if s.scheme not in ADAPTERS:
        return f"from transformers import {factory}\n\nmodel = {factory}.from_pretrained({where})"
    path = Path(packages.joined(s.model))
    inside = f", gguf_file={path.name!r}" if gguf_file.is_meant(path) else ""
    base = repr(str(path.parent) if inside else packages.joined(s.model))
    return (
        f"from peft import PeftModel\nfrom transformers import {factory}\n\n"
        f"base = {factory}.from_pretrained({base}{inside})\n"
        f"model = PeftModel.from_pretrained(base, {where})"
    )


def save(run: Run, m: dict[str, Any]) -> None:
    """Adds the card to the saved weights, and where it is asked for a model of adapter and base.

    The run's model is that one afterwards.
    """
    out = run.out.path
    files.write_text(out / folder.WEIGHTS / CARD, card(run, m))
    if run.settings.merge:
        run.learner = replace(run.learner, model=run.learner.model.merge_and_unload())
        files.write_folder(out / folder.MERGED, run.learner.save)


def card(run: Run, m: dict[str, Any], place: str | None = None) -> str:
    """A model card of the run's own facts, in the hub's form.

    Args:
        run: The run.
        m: Its metrics.
        place: The name on the hub.
    """
    s, metric = run.settings, METRICS[m["metric"]]
    adapter = s.scheme in ADAPTERS
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "tags": [_PROJECT, "zeroth-order", *([s.scheme] if adapter else [])],
        "metrics": [metric.name],
    }
    if not Path(s.model).exists() and not s.model.startswith(packages.PREFIX):
        head["base_model"] = s.model
    before, after = m["dev_accuracy_before"], m["dev_accuracy_after"]
    if after is not None and math.isfinite(after):
        value = {"type": metric.name, "value": round(after, 6), "name": f"dev {metric.name}"}
        data = {"name": run.task.name, "type": run.task.name, "split": "dev"}
        result = {"task": {"type": "text-generation"}, "dataset": data, "metrics": [value]}
        head["model-index"] = [{"name": place or s.out.name, "results": [result]}]
    found = "Nothing was evaluated."
    if after is not None and before is not None:
        found = (
            f"{metric.name} on {m['dev_examples']:,} examples of dev: "
            f"{metric.text(before, m['dev_standard_error_before'])} before and "
            f"**{metric.text(after, m['dev_standard_error_after'])}** after (± one standard error)."
        )
    return "\n".join([
        "---", _yaml(head), "---", "",
        f"# {s.title} on {run.task.name}", "",
        f"`{_base(run)}`, fine-tuned by [{_PROJECT}]({_HOME}): {_how(run, m)}",
        "", "## Result", "", found, "",
        "## Data", "", f"{_nameless(m['data'])}; {len(run.pool):,} examples to train on.", "",
        "## Load", "", "```python", code(run, place), "```", "",
        "## Settings", "",
        "| | |", "|---|---|", *(f"| `{k}` | `{_cell(v)}` |" for k, v in _settings(run).items()), "",
        *_replay(run, m),
    ])  # fmt: skip


def _nameless(source: str) -> str:
    """Where data came from, without the folders of this machine."""
    return re.sub(r"(?<!\S)/?([^\s/]+/)+(?=[^\s/]+\.\w+)|(?<!\S)/(\S+/)*", "", source)


def _how(run: Run, m: dict[str, Any]) -> str:
    s = run.settings
    if key(s.optimizer) in FIRST_ORDER:
        how = "by backpropagation"
    elif key(s.optimizer) == HYBRID:
        how = f"its first {s.hybrid_split} layers by forward passes only"
    else:
        how = "by forward passes only, without a gradient"
    return (
        f"{m['optimizer']}, {m['steps']:,} steps of {s.batch_size} examples, "
        f"{m['forwards']:,} forwards, {how}."
    )


def _settings(run: Run) -> dict[str, Any]:
    """Those that matter and are not what goes without saying; no path of this machine."""
    s = run.settings
    own = {"scheme", "optimizer", "lr", "steps", "batch_size", "seed", "dtype", "max_length"}
    left_out = {"model", "out", "data", "eval_data", "name", "device", "overwrite", "described"}
    left_out |= {"tuned", "auto_lr", "push_to_hub", "report_to", "private", "retry_oom", "task"}
    return {
        name: value
        for name, value in s.plain().items()
        if name in own
        or (name not in left_out and value != getattr(type(s), name, None) and value is not None)
    }


def _replay(run: Run, m: dict[str, Any]) -> list[str]:
    if not run.optimizer.replayable:
        return []
    size = (run.out.path / folder.TRAJECTORY).stat().st_size
    return [
        "## Make it again", "",
        f"`{folder.TRAJECTORY}` ({size:,} bytes) holds every step. From the base model it gives "
        "these weights again, bit for bit:", "",
        "```bash",
        f"zokernels replay {_base(run)} {folder.TRAJECTORY} --until {m['weights_of_step']} "
        "--out model",
        "```", "",
    ]  # fmt: skip


def _base(run: Run) -> str:
    return run.settings.title if Path(run.settings.model).exists() else run.settings.model


def _yaml(head: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip()


def _cell(value: Any) -> str:
    text = brief(value) if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def push(run: Run, m: dict[str, Any]) -> str:
    """Uploads what was saved, with its card and log; returns its address.

    Raises:
        RunError: If the hub does not take it; all else is done then.
    """
    import huggingface_hub as hub

    name, out = run.settings.push_to_hub, run.out.path
    assert name is not None
    api = hub.HfApi()
    weights = out / (folder.MERGED if run.settings.merge else folder.WEIGHTS)
    files.write_text(weights / CARD, card(run, m, name))
    try:
        repo = api.create_repo(name, private=run.settings.private, exist_ok=True)
        additions = [
            hub.CommitOperationAdd(path.relative_to(weights).as_posix(), path)
            for path in sorted(weights.rglob("*"))
            if path.is_file()
        ]
        if run.optimizer.replayable:
            additions.append(hub.CommitOperationAdd(folder.TRAJECTORY, out / folder.TRAJECTORY))
        api.create_commit(repo.repo_id, additions, commit_message=f"{run.task.name} by {_PROJECT}")
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"--push-to-hub {name}: {reason}. The run is whole in {out}; upload it with: "
            f"hf upload {name} {os.fspath(weights)}"
        ) from None
    return str(repo)
