"""``zokernels finetune --preset list``."""

from rich.console import Console

from zokernels.lab.cli import show as printed
from zokernels.lab.runs import presets


def show(console: Console | None = None) -> int:
    """Prints the presets: what their names are made of, and the paper's grids."""
    console = console or Console()
    console.print(
        "A preset is called zo-bench/TASK/MODEL/SCHEME/OPTIMIZER: "
        f"{presets.names()[0]}; there are {len(presets.names())}. It sets the model too, and every "
        "option beside it wins. Grids: of SST-2 on OPT-1.3B; the value that a preset takes has "
        "a star.",
        soft_wrap=True,
        highlight=False,
    )
    models = [(task, ", ".join(names)) for task, names in presets.TASKS.items()]
    printed.table(console, [printed.key("task"), printed.words("models")], models)
    grids = []
    for name in presets.names():
        if name.startswith("zo-bench/sst2/opt-1.3b/"):
            found = presets.get(name)
            *_, scheme, optimizer = name.split("/")
            grids.append((scheme, optimizer, _grid(found, "lr"), _grid(found, "eps")))
    columns = [printed.key("scheme"), printed.key("optimizer")]
    columns += map(printed.words, ("learning rates", "eps"))
    printed.table(console, columns, grids)
    return 0


def _grid(preset: presets.Preset, name: str) -> str:
    chosen = preset.settings.get(name)
    return ", ".join(f"{v:g}{'*' * (v == chosen)}" for v in preset.grid.get(name, ())) or "–"
