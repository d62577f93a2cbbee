"""Tasks that ask yes or no (or maybe) about texts. Prompts: MeZO; clozes: LM-BFF."""

from collections.abc import Iterator
from functools import partial

from zokernels.lab.tasks.task import Hub, Prompts, Row, Task, column_name


def _labels(*names: str) -> dict[str, int]:
    """The index of each, by its name or its number."""
    return {n: i for i, n in enumerate(names)} | {str(i): i for i in range(len(names))}


def _asked(text: str, plain: str) -> Prompts:
    """A question that ends with its choices; the answer stands on the next line."""
    return Prompts(
        text=text,
        plain=plain,
        cloze=f"{text} {{mask}}.",
        plain_cloze=f"{plain} {{mask}}",
        joint="\n",
    )


def _stemmed(row: Row) -> Iterator[Row]:
    """The premise without its last punctuation, which the cloze replaces by a question mark."""
    premise = row[column_name(row, "premise") or "premise"]
    yield {**row, "stem": premise.rstrip(" .?!")}


def _entailment(text: str) -> Prompts:
    return Prompts(
        text=text,
        plain="{premise}\n{hypothesis}",
        cloze="{stem}? {mask}, {hypothesis}",
        plain_cloze="{premise} {mask} {hypothesis}",
        joint="\n",
    )


_INFERENCE = partial(
    Task,
    fields=("premise", "hypothesis"),
    prompts=_entailment('Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?'),
    unfold=_stemmed,
    content=("stem",),
)
_NLI = partial(
    _INFERENCE,
    words=("Yes", "Maybe", "No"),
    labels=_labels("entailment", "neutral", "contradiction") | {"-": -1, "-1": -1},
    cut=(400, 100),
)
_ASKED = partial(Task, words=("No", "Yes"), labels=_labels("false", "true"))

SNLI = _NLI(
    name="snli",
    folder="SNLI",
    hub=Hub("stanfordnlp/snli", "plain_text", valid="validation", dev="test"),
)

MNLI = _NLI(
    name="mnli",
    folder="MNLI",
    hub=Hub("nyu-mll/glue", "mnli", dev="validation_matched"),
)

RTE = _INFERENCE(
    name="rte",
    folder="SuperGLUE/RTE",
    hub=Hub("aps/super_glue", "rte"),
    prompts=_entailment('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?'),
    words=("Yes", "No"),
    labels=_labels("entailment", "not_entailment"),
)

CB = _INFERENCE(
    name="cb",
    folder="SuperGLUE/CB",
    hub=Hub("aps/super_glue", "cb"),
    words=("Yes", "No", "Maybe"),
    labels=_labels("entailment", "contradiction", "neutral"),
)


def _with_question_mark(row: Row) -> Iterator[Row]:
    question = row["question"].strip().rstrip("?")
    yield {**row, "question": question[:1].upper() + question[1:] + "?" if question else ""}


BOOLQ = _ASKED(
    name="boolq",
    folder="SuperGLUE/BoolQ",
    hub=Hub("aps/super_glue", "boolq"),
    fields=("passage", "question"),
    prompts=_asked("{passage} {question}", "{passage}\n{question}"),
    unfold=_with_question_mark,
    cut=(1000, 500),
)

WIC = _ASKED(
    name="wic",
    folder="SuperGLUE/WiC",
    hub=Hub("aps/super_glue", "wic"),
    fields=("sentence1", "sentence2", "word"),
    prompts=_asked(
        'Does the word "{word}" have the same meaning in these two sentences? Yes or No?\n'
        "{sentence1}\n{sentence2}",
        "{word}\n{sentence1}\n{sentence2}",
    ),
)


def _spans(row: Row) -> Iterator[Row]:
    """SuperGLUE's own files hold the two spans inside ``target``; the hub's do not."""
    spans = row.get("target", row)
    yield {**row, "noun": spans["span1_text"], "pronoun": spans["span2_text"]}


WSC = _ASKED(
    name="wsc",
    folder="SuperGLUE/WSC",
    hub=Hub("aps/super_glue", "wsc"),
    fields=("text", "noun", "pronoun"),
    prompts=_asked(
        '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? '
        "Yes or No?",
        "{text}\n{pronoun}\n{noun}",
    ),
    unfold=_spans,
)


def _each_answer(row: Row) -> Iterator[Row]:
    """SuperGLUE's own files nest answers in questions in a passage; the hub's hold one a row."""
    if "passage" not in row:
        yield {**row, "answer": row["answer"]}
        return
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer["label"],
            }


MULTIRC = _ASKED(
    name="multirc",
    folder="SuperGLUE/MultiRC",
    hub=Hub("aps/super_glue", "multirc"),
    # Some published answers are empty, and count all the same.
    fields=("paragraph", "question"),
    content=("answer",),
    prompts=_asked(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
        "Yes or No?",
        "{paragraph}\n{question}\n{answer}",
    ),
    unfold=_each_answer,
)
