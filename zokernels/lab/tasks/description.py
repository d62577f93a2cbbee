"""A task of one's own: a YAML file with its prompt, its answers and where its data is."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zokernels.lab import yaml_file
from zokernels.lab.errors import InputError, shown
from zokernels.lab.tasks.metric import METRICS
from zokernels.lab.tasks.task import Prompts, Row, Task

ENDINGS = (".yaml", ".yml")
_TEXTS = (
    "name",
    "prompt",
    "plain",
    "cloze",
    "plain_cloze",
    "joint",
    "label_text",
    "label",
    "answer",
)
_KEYS = (*_TEXTS, "words", "labels", "candidates", "metric", "data", "eval_data", "columns")
_ANSWERS = ("words", "candidates", "answer")
_MASK, _WORD = "mask", "word"
# What ``description`` itself adds: where its relative paths begin.
FOLDER = "folder"


def read(path: Path) -> dict[str, Any]:
    """A description as plain values, which a run keeps.

    Raises:
        InputError: One sentence with the line and the key that cannot be used, and what it allows.
    """
    text = yaml_file.read(path, "task")
    # As texts: a label "yes" is no truth value, and "1" no number.
    given = yaml_file.mapping(yaml_file.load(text, path, "task", True), path, "the file")
    yaml_file.known(given, _KEYS, path, "")
    plain = {"name": path.stem, **given, FOLDER: str(path.absolute().parent)}
    made = _Maker(plain, lambda key: yaml_file.place(given, key, path))
    made.task()
    return plain


def task(plain: Mapping[str, Any]) -> Task:
    """The task of a description that was read."""
    return _Maker(plain, lambda key: f"task {plain['name']}").task()


class _Maker:
    """Makes a task of plain values, and says where one of them is wrong."""

    def __init__(self, plain: Mapping[str, Any], where: Callable[[str], str]) -> None:
        self.plain = plain
        self.where = where

    def task(self) -> Task:
        plain = self.plain
        for key in _TEXTS:
            if not isinstance(plain.get(key, ""), str):
                raise self.wrong(key, "must be a text")
        given = [key for key in _ANSWERS if key in plain]
        if not given or {"words"} < {*given}:
            raise self.wrong(
                given[-1] if given else "prompt",
                "has to say how an answer is given, by one of words, candidates and answer",
            )
        prompts = self.prompts()
        columns = self.columns_of("prompt")
        words, labels = self.words()
        choices, options = self.candidates()
        written = "answer" in plain
        metric = plain.get("metric")
        if metric is not None and metric not in METRICS:
            raise self.wrong("metric", f"must be one of {', '.join(METRICS)}")
        return Task(
            name=plain["name"],
            fields=columns,
            prompts=prompts,
            words=words,
            label=plain.get("label", "label"),
            labels=labels,
            choices=choices,
            plain_choices=choices,
            answers=_texts_of(plain["answer"]) if written else None,
            options=options,
            places=self.places(),
            ends=written and choices is None,
        ).measured_by(metric)

    def prompts(self) -> Prompts:
        plain = self.plain
        if not plain.get("prompt"):
            raise InputError(
                f"{self.where('prompt')}: a task needs prompt: what is read before an "
                "answer, with its {columns} in braces."
            )
        columns = self.columns_of("prompt")
        if not columns:
            raise self.wrong("prompt", "must have a column in braces, such as {text}")
        bare = "\n".join(f"{{{name}}}" for name in columns)
        for key in ("cloze", "plain_cloze"):
            if key in plain and _MASK not in self.named(key):
                raise self.wrong(key, "must have the blank of a masked LM, {mask}")
        for key, own in (
            ("plain", ()),
            ("cloze", (_MASK,)),
            ("plain_cloze", (_MASK,)),
            ("label_text", (_WORD,)),
        ):
            wanted = () if key == "label_text" else columns
            if more := [n for n in self.named(key) if n not in (*wanted, *own)]:
                raise self.wrong(key, f"has {{{more[0]}}}, which the prompt does not have")
        cloze = plain.get("cloze")
        return Prompts(
            text=plain["prompt"],
            plain=plain.get("plain", bare),
            cloze=cloze,
            plain_cloze=plain.get("plain_cloze", f"{bare} {{{_MASK}}}" if cloze else None),
            joint=plain.get("joint", " "),
            label=plain.get("label_text", f"{{{_WORD}}}"),
        )

    def words(self) -> tuple[tuple[str, ...], Mapping[str, int] | None]:
        """The label words, and what the label column may hold by index."""
        given = self.plain.get("words", ())
        if isinstance(given, Mapping):
            values, each = list(given), self.texts("words", list(given.values()))
            # Several labels may share a word.
            words = tuple(dict.fromkeys(map(str, each)))
            labels = {
                v.strip().lower(): words.index(str(w)) for v, w in zip(values, each, strict=True)
            }
        else:
            words = self.texts("words", given)
            labels = {str(i): i for i in range(len(words))}
            labels |= {w.strip().lower(): i for i, w in enumerate(words)}
        if "words" not in self.plain:
            return (), self.labels()
        if "labels" in self.plain:
            raise self.wrong("labels", "is for candidates; words take theirs as keys")
        if len(words) < 2 or not all(w.strip() for w in words):
            raise self.wrong("words", "must be two words at least, none of them empty")
        return words, labels

    def labels(self) -> Mapping[str, int] | None:
        """Those of candidates."""
        given = self.texts("labels", self.plain.get("labels", ()))
        found = self.plain.get("candidates", ())
        if isinstance(found, str):
            if "answer" not in self.plain:
                raise self.wrong(
                    "candidates", "from a column's lists need answer, the column with the right one"
                )
            return None
        if given and len(given) != len(found):
            raise self.wrong("labels", f"must be {len(found)}, one a candidate")
        return {v.strip().lower(): i for i, v in enumerate(given or map(str, range(len(found))))}

    def candidates(self) -> tuple[Callable[[Row], Sequence[str]] | None, tuple[str, ...]]:
        """A row's candidates, and the columns that they are made of."""
        given = self.plain.get("candidates")
        if given is None:
            return None, ()
        if isinstance(given, str):
            return _listed(given), (given,)
        texts = self.texts("candidates", given)
        if len(texts) < 2:
            raise self.wrong("candidates", "must be two at least, or the column with their list")
        columns = tuple(dict.fromkeys(n for text in texts for n in self.parsed("candidates", text)))
        asked = self.columns_of("prompt")
        return _filled(texts), tuple(n for n in columns if n not in asked)

    def places(self) -> dict[str, Any]:
        """Where the data is, its paths as they are seen from the file."""
        found: dict[str, Any] = {}
        for key in ("data", "eval_data"):
            if key in self.plain:
                given = self.plain[key]
                if not isinstance(given, str):
                    raise self.wrong(key, "must be a file, a folder or a data set's name")
                beside = Path(self.plain.get(FOLDER, ".")) / given
                found[key] = str(beside) if beside.exists() else given
        columns = self.plain.get("columns", {})
        if not isinstance(columns, Mapping) or not all(
            isinstance(v, str) for v in columns.values()
        ):
            raise self.wrong("columns", "must hold a column of the data for each name used here")
        return {**found, **({"columns": dict(columns)} if columns else {})}

    def texts(self, key: str, given: Any) -> tuple[str, ...]:
        if isinstance(given, str) or not all(isinstance(v, str) for v in given):
            raise self.wrong(key, "must be a list of texts")
        return tuple(given)

    def columns_of(self, key: str) -> tuple[str, ...]:
        return tuple(n for n in self.named(key) if n != _MASK)

    def named(self, key: str) -> tuple[str, ...]:
        """The names in a text's braces."""
        return self.parsed(key, self.plain.get(key, ""))

    def parsed(self, key: str, text: str) -> tuple[str, ...]:
        try:
            found = [(name, form, kind) for _, name, form, kind in string.Formatter().parse(text)]
        except ValueError as error:
            raise self.wrong(
                key, f"has braces that do not match ({error}); a brace of the text is written twice"
            ) from None
        names = [name for name, _, _ in found if name is not None]
        for name, form, kind in found:
            if name is not None and (form or kind or not name or {*name} & {*".[]"}):
                raise self.wrong(
                    key,
                    "must have nothing but a column's name in its braces; a brace "
                    "of the text is written twice",
                )
        return tuple(dict.fromkeys(names))

    def wrong(self, key: str, what: str) -> InputError:
        got = self.plain.get(key)
        return InputError(
            f"{self.where(key)}: {key} {what}{'' if got is None else f'; got {shown(got)}'}."
        )


def _texts_of(column: str) -> Callable[[Row], Sequence[str]]:
    def answers(row: Row) -> Sequence[str]:
        found = row[column]
        return [str(a) for a in found] if isinstance(found, list | tuple) else [str(found)]

    return answers


def _listed(column: str) -> Callable[[Row], Sequence[str]]:
    def choices(row: Row) -> Sequence[str]:
        found = row[column]
        if isinstance(found, str):
            raise TypeError(f"{column} must be a list of candidates, got {shown(found)}")
        return [str(c) for c in found]

    return choices


def _filled(texts: Sequence[str]) -> Callable[[Row], Sequence[str]]:
    return lambda row: [text.format_map(row).strip() for text in texts]
