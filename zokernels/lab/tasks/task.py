"""What a task is: the fields of its rows, the prompts made of them, and how an answer is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zokernels.lab.errors import InputError, cut, shown
from zokernels.lab.tasks.metric import ACCURACY, F1, METRICS, Metric

Row = Mapping[str, Any]

# The same column has other names in other publications of a data set.
_ALIASES = {
    "sentence": ("text",),
    "premise": ("sentence1", "text_a"),
    "hypothesis": ("sentence2", "text_b"),
    "label": ("gold_label", "answer", "coarse_label"),
    "context": ("passage",),
    "question": ("query",),
}
_CONTENT_FREE = "N/A"


@dataclass(frozen=True)
class Example:
    """One labelled row.

    Attributes:
        sentence: Its main text, whose words are counted by ``--min-words`` and ``--max-words``.
        label: Index of the right candidate; 0 where the answer is generated.
        fields: All the texts that prompts are made of, the main one too.
        answers: Every right answer, where there can be several.
        turns: A conversation before the answer, each turn with its role and content.
    """

    sentence: str
    label: int
    fields: Row = field(default_factory=dict, hash=False)
    answers: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Prompts:
    """A task's texts, as format strings over its fields.

    Attributes:
        text: What a causal model reads before a candidate.
        cloze: What a masked model reads; ``{mask}`` is its blank. None: it can't do this task.
        plain: ``text`` without a word of ours, for ``--no-template``.
        plain_cloze: ``cloze`` likewise.
        joint: What stands between a text and a candidate.
        label: What stands for a label word in a sentence encoder.
    """

    text: str
    plain: str
    cloze: str | None = None
    plain_cloze: str | None = None
    joint: str = " "
    label: str = "{word}"


@dataclass(frozen=True)
class Hub:
    """Where the hub holds a task: the data set, its files, and which split is for what."""

    repo: str
    config: str = "default"
    train: str = "train"
    valid: str | None = None
    dev: str = "validation"
    revision: str | None = "refs/convert/parquet"
    path: str = "{config}/{split}/0000.parquet"
    labels: Mapping[str, int] | None = None

    def file(self, split: str) -> str:
        """The path of a split's file in the data set."""
        return self.path.format(config=self.config, split=split)


@dataclass(frozen=True)
class Task:
    """A row of the table of tasks.

    Attributes:
        name: What ``--task`` takes.
        fields: The columns it needs, the main text first.
        prompts: Its texts.
        folder: Its folder inside a data folder; empty for a task of the user's own.
        hub: Its place on the hub, if it is a published one.
        words: The label words in the order of the labels; empty if candidates differ by example.
        label: The column with the label.
        labels: What the label column may hold, by index; -1 stands for "not labelled", and such
            rows are left out. None: 0, 1, … as many as there are words.
        choices: An example's own candidates, made of its fields.
        plain_choices: The same for ``--no-template``.
        answers: Every right answer of a row, for tasks whose answers are texts; with ``choices``
            they must be among these, and the first is the label.
        options: The columns that ``choices`` are made of, as far as they are not ``fields``.
        content: Names that ``unfold`` adds and calibration empties as it does ``fields``.
        unfold: Turns a row of some publication into rows with the columns above.
        shipped: The small set inside the package.
        train_file: Name of the file to train on, without its ending.
        cut: Where only one file is published: how many rows, in its order, are for training and
            for picking; the rest is reported.
        places: Where a description says that the data is: "data", "eval_data" and "columns".
        ends: Whether the end of an answer that is written is learned, and waited for; else it
            ends with its line.
        measured: The metric, where that is not the one that goes without saying.
        asked: Whether rows have no answer yet.
        template: False for the texts without a template.
    """

    name: str
    fields: tuple[str, ...]
    prompts: Prompts
    folder: str = ""
    hub: Hub | None = None
    words: tuple[str, ...] = ()
    label: str = "label"
    labels: Mapping[str, int] | None = None
    choices: Callable[[Row], Sequence[str]] | None = None
    plain_choices: Callable[[Row], Sequence[str]] | None = None
    answers: Callable[[Row], Sequence[str]] | None = None
    unfold: Callable[[Row], Iterable[Row]] | None = None
    options: tuple[str, ...] = ()
    content: tuple[str, ...] = ()
    shipped: str | None = None
    train_file: str = "train"
    cut: tuple[int, int] | None = None
    places: Mapping[str, Any] = field(default_factory=dict)
    ends: bool = False
    measured: Metric | None = None
    asked: bool = False
    template: bool = True

    @property
    def generates(self) -> bool:
        """Whether the answer is written by the model, not chosen."""
        return self.answers is not None and self.choices is None

    @property
    def metric(self) -> Metric:
        """What is reported: by default F1 over words for written answers, else the accuracy."""
        return self.measured or (F1 if self.generates else ACCURACY)

    def measured_by(self, name: str | None) -> Task:
        """The task with another metric.

        Raises:
            InputError: If it has none of that name.
        """
        if name is None:
            return self
        fitting = [m for m in METRICS.values() if m.share is False or m.written == self.generates]
        if name not in {m.name for m in fitting}:
            raise InputError(
                f"--metric {name} does not fit task {self.name}, whose answers are "
                f"{'written' if self.generates else 'chosen'}; it may be "
                f"{' or '.join(m.name for m in fitting)}."
            )
        return replace(self, measured=METRICS[name])

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have, but for those of written answers."""
        label = () if self.answers is not None or self.asked else (self.label,)
        return (*self.fields, *self.options, *label)

    @property
    def names(self) -> Mapping[str, int]:
        """What a label column may hold, and the index that it means."""
        if self.labels is not None:
            return self.labels
        return {str(i): i for i in range(len(self.words))}

    def with_template(self, template: bool) -> Task:
        """The task with or without its template."""
        return replace(self, template=template)

    def unlabelled(self) -> Task:
        """The task for rows that have no answer yet: their label is the first, and not meant."""
        return replace(self, asked=True)

    def label_name(self, index: int) -> str:
        """What the data calls the label of an index."""
        found = [name for name, i in self.names.items() if i == index]
        return next(
            (name for name in found if not name.isdigit()), found[0] if found else str(index)
        )

    def prompt(self, example: Example) -> str:
        """The text that a causal model reads before a candidate."""
        text = self.prompts.text if self.template else self.prompts.plain
        return text.format_map(self._texts(example))

    def candidates(self, example: Example) -> list[str]:
        """The continuations between which a causal model chooses, or the answer to write."""
        if self.words:
            found: Sequence[str] = self.words
        elif self.choices is not None:
            own = self.choices if self.template else (self.plain_choices or self.choices)
            found = own(example.fields)
        else:
            found = example.answers[:1]
        return [self.prompts.joint + candidate for candidate in found]

    def cloze(self, example: Example, mask: str) -> str:
        """The text whose blank a masked model fills with a label word.

        Raises:
            InputError: If there is none.
        """
        form = self.prompts.cloze if self.template else self.prompts.plain_cloze
        if form is None:
            raise InputError(
                f"Task {self.name} scores whole texts and has no blank for a label word, so a "
                "masked LM can't do it; use a causal LM."
            )
        return form.format_map({**self._texts(example), "mask": mask})

    def label_sentences(self) -> list[str]:
        """The sentences whose embeddings stand for the labels in a sentence encoder.

        Raises:
            InputError: If there are none.
        """
        if not self.words:
            raise InputError(
                f"Task {self.name} has no label words, so a sentence encoder can't do it; use a "
                "causal LM."
            )
        form = self.prompts.label if self.template else "{word}"
        return [form.format(word=word) for word in self.words]

    def content_free(self, example: Example) -> Example:
        """The example with its texts emptied and its candidates kept, for calibration."""
        emptied = dict.fromkeys((*self.fields, *self.content), _CONTENT_FREE)
        return replace(example, fields={**example.fields, **emptied})

    def read(self, row: Row, where: str) -> list[Example]:
        """The examples of a row: one, none if it carries no label, or several.

        Args:
            row: Column names and values.
            where: File and line, for the error.

        Raises:
            InputError: One sentence that says where and what is wrong.
        """
        try:
            found = self._examples(row, where)
            for example in found:
                self._check(example, where)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise InputError(
                f"{where}: this is no row of {self.name} ({type(error).__name__}: "
                f"{cut(str(error))}); "
                f"docs/tasks.md says what its columns are."
            ) from None
        return found

    def _examples(self, row: Row, where: str) -> list[Example]:
        rows = list(self.unfold(row)) if self.unfold is not None else [row]
        made = [self._example(r, where) for r in rows]
        return [e for e in made if e is not None]

    def _check(self, example: Example, where: str) -> None:
        """Raise unless every text of a row is one: what a run would find out in its middle."""
        for name in self.fields:
            if not isinstance(example.fields[name], str):
                raise InputError(
                    f"{where}: the {name} must be a text, got {shown(example.fields[name])}; put "
                    "it in quotes or remove the row."
                )
        texts = [self.prompt(example), *self.candidates(example), *example.answers]
        # Half of a surrogate pair, which JSON can hold and no tokenizer takes.
        "".join(texts).encode()

    def _example(self, row: Row, where: str) -> Example | None:
        named = {n: _column(row, n, where) for n in (*self.fields, *self.options)}
        if self.hub is None:
            # A row of one's own may have numbers in its texts.
            named = {n: str(v) if type(v) in (int, float) else v for n, v in named.items()}
        fields = {**row, **named}
        for name in self.fields:
            if not str(fields[name]).strip():
                raise InputError(f"{where}: the {name} is empty; give it words or remove the row.")
        sentence = str(fields[self.fields[0]])
        if self.asked:
            return Example(sentence, 0, fields, ("",) if self.generates else ())
        if self.answers is not None:
            return self._answered(row, where, sentence, fields)
        given = _column(row, self.label, where)
        # A column of whole numbers that has gaps comes as one of floats.
        whole = isinstance(given, float) and given.is_integer()
        label = str(int(given) if whole else given).strip().lower()
        if label not in self.names:
            raise InputError(
                f"{where}: the {self.label} must be {cut(' or '.join(self.names))}, got "
                f"'{cut(str(given))}'."
            )
        index = self.names[label]
        return None if index < 0 else Example(sentence, index, fields)

    def _answered(self, row: Row, where: str, sentence: str, fields: Row) -> Example:
        assert self.answers is not None
        answers = tuple(self.answers(row))
        if not answers:
            raise InputError(f"{where}: there is no answer; give one or remove the row.")
        if self.choices is None:
            return Example(sentence, 0, fields, answers)
        found = self.choices(fields)
        if not set(found) & set(answers):
            raise InputError(
                f"{where}: none of the answers ({cut(', '.join(answers))}) is among the candidates."
            )
        return Example(
            sentence, next(i for i, c in enumerate(found) if c in answers), fields, answers
        )

    def _texts(self, example: Example) -> dict[str, str]:
        fields = {self.fields[0]: example.sentence, **example.fields}
        return {name: value.strip() for name, value in fields.items() if isinstance(value, str)}


def column_name(row: Iterable[str], name: str) -> str | None:
    """The row's own name for a column, if it has it."""
    known = set(row)
    return next((n for n in (name, *_ALIASES.get(name, ())) if n in known), None)


def _column(row: Row, name: str, where: str) -> Any:
    own = column_name(row, name)
    if own is None:
        has = cut(", ".join(row))
        raise InputError(f"{where}: the column '{name}' is missing; it has {has}.")
    if row[own] is None:
        raise InputError(f"{where}: the {own} is null; give it a value or remove the row.")
    return row[own]
