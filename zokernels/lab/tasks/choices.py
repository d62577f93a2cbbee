"""Tasks whose candidates differ by example: COPA, WinoGrande and ReCoRD. Prompts: MeZO."""

from collections.abc import Iterator

from zokernels.lab.tasks.task import Hub, Prompts, Row, Task


def _effect_or_cause(row: Row) -> Iterator[Row]:
    links = {"cause": "because", "effect": "so"}
    link = links[row["question"]]
    yield {**row, "stem": row["premise"].strip().removesuffix("."), "link": link}


def _continued(row: Row) -> list[str]:
    return [_lowered(row[name].strip()) for name in ("choice1", "choice2")]


def _lowered(sentence: str) -> str:
    """Its first word in lower case, unless that is "I"."""
    first = sentence.split(" ", 1)[0].split("'", 1)[0]
    return sentence if first == "I" else sentence[:1].lower() + sentence[1:]


COPA = Task(
    name="copa",
    folder="SuperGLUE/COPA",
    hub=Hub("aps/super_glue", "copa"),
    fields=("stem", "premise"),
    prompts=Prompts(text="{stem} {link}", plain="{premise}"),
    labels={"0": 0, "1": 1},
    choices=_continued,
    plain_choices=lambda row: [row["choice1"].strip(), row["choice2"].strip()],
    unfold=_effect_or_cause,
)


def _around_the_blank(row: Row) -> Iterator[Row]:
    before, after = row["sentence"].split("_")
    yield {**row, "before": before, "after": after}


WINOGRANDE = Task(
    name="winogrande",
    folder="WinoGrande",
    hub=Hub("allenai/winogrande", "winogrande_l"),
    fields=("sentence",),
    prompts=Prompts(text="{before}", plain="{sentence}"),
    labels={"1": 0, "2": 1},
    choices=lambda row: [row[n].strip() + row["after"].rstrip() for n in ("option1", "option2")],
    plain_choices=lambda row: [row["option1"].strip(), row["option2"].strip()],
    unfold=_around_the_blank,
    content=("before",),
    train_file="train_l",
)


def _entities(row: Row) -> Iterator[Row]:
    """Each query of a passage: SuperGLUE's own files nest them, the hub's hold one a row."""
    if isinstance(row["passage"], str):
        passage, queries = row["passage"], [row]
        entities = list(row["entities"])
    else:
        passage, queries = row["passage"]["text"], row["qas"]
        # The ends of spans are inclusive there.
        spans = [passage[e["start"] : e["end"] + 1] for e in row["passage"]["entities"]]
        entities = list(dict.fromkeys(spans))
    for query in queries:
        answers = [a if isinstance(a, str) else a["text"] for a in query["answers"]]
        yield {
            "passage": passage.replace("@highlight\n", "- "),
            "query": query["query"],
            "entities": entities,
            "right": answers,
        }


RECORD = Task(
    name="record",
    folder="SuperGLUE/ReCoRD",
    hub=Hub("aps/super_glue", "record"),
    fields=("passage", "query"),
    prompts=Prompts(
        text='{passage}\n{query}\nQuestion: What is the "@placeholder"\nAnswer:',
        plain="{passage}\n{query}",
    ),
    choices=lambda row: row["entities"],
    answers=lambda row: row["right"],
    unfold=_entities,
)
