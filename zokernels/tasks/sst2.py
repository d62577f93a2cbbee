"""SST-2: is a sentence of a film review positive? Prompted by label words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One labelled sentence; ``label`` is an index into the task's label words."""

    sentence: str
    label: int


@dataclass(frozen=True)
class Task:
    """A sentence classification task by prompts.

    Attributes:
        name: What ``--task`` takes.
        folder: Name of its folder inside a data folder.
        hub: Name of its data set on the hub.
        shipped: Name of the small set inside the package.
        words: The label words, in the order of the labels.
    """

    name: str
    folder: str
    hub: str
    shipped: str
    words: tuple[str, ...]

    def prompt(self, sentence: str) -> str:
        """The text that a causal model reads before a candidate."""
        return f"{sentence.strip()} It was"

    def candidates(self) -> list[str]:
        """The continuations between which a causal model chooses."""
        return [f" {word}" for word in self.words]

    def cloze(self, sentence: str, mask_token: str) -> str:
        """The text whose blank a masked model fills with a label word."""
        return f"{sentence.strip()} It was {mask_token}."

    def label_sentences(self) -> list[str]:
        """The sentences whose embeddings stand for the labels in a sentence encoder."""
        return [f"It was {word}." for word in self.words]


SST2 = Task("sst2", "SST-2", "stanfordnlp/sst2", "sst2_mini", ("terrible", "great"))
