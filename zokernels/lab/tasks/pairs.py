"""Tasks that ask yes or no (or maybe) about texts. Prompts: MeZO; clozes: LM-BFF."""

from collections.abc import Iterator

from zokernels.lab.tasks.task import Hub, Prompts, Row, Task, column_name

_NO_YES = {"false": 0, "true": 1, "0": 0, "1": 1}
_CLOZE = dict(cloze="{stem}? {mask}, {hypothesis}", plain_cloze="{premise} {mask} {hypothesis}")


def _super_glue(config: str) -> Hub:
    return Hub("aps/super_glue", config)


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


def _inference(name: str, folder: str, hub: Hub, cut: tuple[int, int] | None = None) -> Task:
    return Task(
        name=name,
        folder=folder,
        hub=hub,
        fields=("premise", "hypothesis"),
        prompts=Prompts(
            text='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?',
            plain="{premise}\n{hypothesis}",
            joint="\n",
            **_CLOZE,
        ),
        words=("Yes", "Maybe", "No"),
        labels={"entailment": 0, "neutral": 1, "contradiction": 2, "0": 0, "1": 1, "2": 2}
        | {"-": -1, "-1": -1},
        unfold=_stemmed,
        content=("stem",),
        cut=cut,
    )


SNLI = _inference(
    "snli",
    "SNLI",
    Hub("stanfordnlp/snli", "plain_text", valid="validation", dev="test"),
    (400, 100),
)
MNLI = _inference("mnli", "MNLI", Hub("nyu-mll/glue", "mnli", dev="validation_matched"), (400, 100))

RTE = Task(
    name="rte",
    folder="SuperGLUE/RTE",
    hub=_super_glue("rte"),
    fields=("premise", "hypothesis"),
    prompts=Prompts(
        text='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?',
        plain="{premise}\n{hypothesis}",
        joint="\n",
        **_CLOZE,
    ),
    words=("Yes", "No"),
    labels={"entailment": 0, "not_entailment": 1, "0": 0, "1": 1},
    unfold=_stemmed,
    content=("stem",),
)

CB = Task(
    name="cb",
    folder="SuperGLUE/CB",
    hub=_super_glue("cb"),
    fields=("premise", "hypothesis"),
    prompts=SNLI.prompts,
    words=("Yes", "No", "Maybe"),
    labels={"entailment": 0, "contradiction": 1, "neutral": 2, "0": 0, "1": 1, "2": 2},
    unfold=_stemmed,
    content=("stem",),
)


def _with_question_mark(row: Row) -> Iterator[Row]:
    question = row["question"].strip().rstrip("?")
    yield {**row, "question": question[:1].upper() + question[1:] + "?" if question else ""}


BOOLQ = Task(
    name="boolq",
    folder="SuperGLUE/BoolQ",
    hub=_super_glue("boolq"),
    fields=("passage", "question"),
    prompts=_asked("{passage} {question}", "{passage}\n{question}"),
    words=("No", "Yes"),
    labels=_NO_YES,
    unfold=_with_question_mark,
    cut=(1000, 500),
)

WIC = Task(
    name="wic",
    folder="SuperGLUE/WiC",
    hub=_super_glue("wic"),
    fields=("sentence1", "sentence2", "word"),
    prompts=_asked(
        'Does the word "{word}" have the same meaning in these two sentences? Yes or No?\n'
        "{sentence1}\n{sentence2}",
        "{word}\n{sentence1}\n{sentence2}",
    ),
    words=("No", "Yes"),
    labels=_NO_YES,
)


def _spans(row: Row) -> Iterator[Row]:
    """SuperGLUE's own files hold the two spans inside ``target``; the hub's do not."""
    spans = row.get("target", row)
    yield {**row, "noun": spans["span1_text"], "pronoun": spans["span2_text"]}


WSC = Task(
    name="wsc",
    folder="SuperGLUE/WSC",
    hub=_super_glue("wsc"),
    fields=("text", "noun", "pronoun"),
    prompts=_asked(
        '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? '
        "Yes or No?",
        "{text}\n{pronoun}\n{noun}",
    ),
    words=("No", "Yes"),
    labels=_NO_YES,
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


MULTIRC = Task(
    name="multirc",
    folder="SuperGLUE/MultiRC",
    hub=_super_glue("multirc"),
    # Some published answers are empty, and count all the same.
    fields=("paragraph", "question"),
    content=("answer",),
    prompts=_asked(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
        "Yes or No?",
        "{paragraph}\n{question}\n{answer}",
    ),
    words=("No", "Yes"),
    labels=_NO_YES,
    unfold=_each_answer,
)
