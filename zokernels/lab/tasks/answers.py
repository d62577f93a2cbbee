"""Tasks whose answer the model writes: SQuAD and DROP, measured by F1 over words."""

from collections.abc import Sequence
from functools import partial

from zokernels.lab.tasks.task import Hub, Prompts, Row, Task


def _texts(row: Row) -> Sequence[str]:
    """The answers of a row, in any of the forms that these sets are published in."""
    found = row.get("answers", row.get("answers_spans", row.get("answer")))
    if isinstance(found, str):
        return [found]
    if isinstance(found, dict):
        found = found["text"] if "text" in found else found["spans"]
    return list(dict.fromkeys(str(a) for a in found or []))


def _asked(kind: str) -> Prompts:
    return Prompts(
        text=f"{kind}: {{context}}\nQuestion: {{question}}\nAnswer:",
        plain="{context}\n{question}",
    )


_READ = partial(Task, fields=("context", "question"), answers=_texts)

SQUAD = _READ(
    name="squad",
    folder="SQuAD",
    hub=Hub("rajpurkar/squad", "plain_text"),
    prompts=_asked("Context"),
    cut=(300, 50),
)

DROP = _READ(name="drop", folder="DROP", hub=Hub("ucinlp/drop"), prompts=_asked("Passage"))
