"""Tasks about one sentence: SST-2, SST-5 and TREC. Prompts: LM-BFF and MeZO."""

from zokernels.lab.tasks.task import Hub, Prompts, Task

_REVIEW = Prompts(
    text="{sentence} It was",
    plain="{sentence}",
    cloze="{sentence} It was {mask}.",
    plain_cloze="{sentence} {mask}",
    label="It was {word}.",
)

SST2 = Task(
    name="sst2",
    folder="SST-2",
    hub=Hub("stanfordnlp/sst2", revision=None, path="data/{split}-00000-of-00001.parquet"),
    fields=("sentence",),
    prompts=_REVIEW,
    words=("terrible", "great"),
    shipped="sst2_mini",
)

SST5 = Task(
    name="sst5",
    folder="SST-5",
    hub=Hub("SetFit/sst5", revision=None, path="{split}.jsonl", valid="dev", dev="test"),
    fields=("sentence",),
    prompts=_REVIEW,
    words=("terrible", "bad", "okay", "good", "great"),
)

TREC = Task(
    name="trec",
    folder="TREC",
    # The hub's coarse labels are ABBR, ENTY, DESC, HUM, LOC, NUM.
    hub=Hub("CogComp/trec", dev="test", labels={"0": 2, "1": 1, "2": 0, "3": 3, "4": 4, "5": 5}),
    fields=("sentence",),
    prompts=Prompts(
        text="{sentence}\nThis question asks for a",
        plain="{sentence}",
        cloze="{mask}: {sentence}",
        plain_cloze="{mask} {sentence}",
    ),
    words=("Description", "Entity", "Expression", "Human", "Location", "Number"),
)
