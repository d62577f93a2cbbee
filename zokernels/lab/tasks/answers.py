"""Tasks whose answer the model writes: SQuAD and DROP, measured by F1 over words."""

from collections.abc import Sequence

from zokernels.lab.tasks.task import Hub, Prompts, Row, Task


def _texts(row: Row) -> Sequence[str]:
    """The answers of a row, in any of the forms that these sets are published in."""
    found = row.get("answers", row.get("answers_spans", row.get("answer")))
    if isinstance(found, str):
        return [found]
    if isinstance(found, dict):
        found = found["text"] if "text" in found else found["spans"]
    return list(dict.fromkeys(str(a) for a in found or []))


SQUAD = Task(
    name="squad",
    folder="SQuAD",
    hub=Hub("rajpurkar/squad", "plain_text"),
    fields=("context", "question"),
    prompts=Prompts(
        text="Context: {context}\nQuestion: {question}\nAnswer:",
        plain="{context}\n{question}",
    ),
    answers=_texts,
    cut=(300, 50),
)

DROP = Task(
    name="drop",
    folder="DROP",
    hub=Hub("ucinlp/drop"),
    fields=("context", "question"),
    prompts=Prompts(
        text="Passage: {context}\nQuestion: {question}\nAnswer:",
        plain="{context}\n{question}",
    ),
    answers=_texts,
)
