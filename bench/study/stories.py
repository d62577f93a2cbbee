"""The story model as a model folder: ``python -m bench.study.stories SOURCE OUT``.

SOURCE holds ``model.safetensors`` and ``config.json`` in transformers' names, and ``tok512.json``,
the tokenizer of llama2.c as a list of [piece, score]. What is made here is that tokenizer in
transformers' form: merges in the order of their scores, bytes for what it does not know.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

BYTES = range(3, 259)


def tokenizer(pieces: list[tuple[str, float]]):
    """The fast tokenizer of scored pieces; a piece's place is its number."""
    from tokenizers import Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(piece for piece, _ in pieces[3:])]
    known = {name: number for number, name in enumerate(names)}
    merges = []
    for number in sorted(range(BYTES.stop, len(names)), key=lambda i: -pieces[i][1]):
        piece = names[number]
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [(a, b) for a, b in halves if a in known and b in known]
    inner = Tokenizer(BPE(known, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Prepend(" ")
    inner.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def reference(text: str, pieces: list[tuple[str, float]]) -> list[int]:
    """The rule itself: of all neighbours those are joined whose joined piece scores highest.

    Source: the encoding of llama2.c.
    """
    known = {piece: i for i, (piece, _) in enumerate(pieces) if i >= BYTES.stop}
    ids: list[int] = []
    for character in " " + text if text else "":
        if character in known:
            ids.append(known[character])
        else:
            ids += [BYTES.start + byte for byte in character.encode()]
    while True:
        found = None
        for i in range(len(ids) - 1):
            if min(ids[i : i + 2]) < BYTES.stop:
                continue
            joined = known.get(pieces[ids[i]][0] + pieces[ids[i + 1]][0])
            if joined is not None and (found is None or pieces[joined][1] > found[0]):
                found = (pieces[joined][1], i, joined)
        if found is None:
            return [1, *ids]
        _, i, joined = found
        ids[i : i + 2] = [joined]


def main(arguments: list[str] | None = None) -> int:
    """Make the folder; 2 where something is missing or in the way."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.stories", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    files = ["model.safetensors", "config.json", "tok512.json"]
    if missing := [f for f in files if not (options.source / f).is_file()]:
        print(f"{options.source} has no {missing[0]}; name the model's folder.", file=sys.stderr)
        return 2
    if options.out.exists():
        print(f"{options.out} exists; name a new folder.", file=sys.stderr)
        return 2
    pieces = [tuple(p) for p in json.loads((options.source / "tok512.json").read_text())]
    options.out.mkdir(parents=True)
    for name in files[:2]:
        shutil.copyfile(options.source / name, options.out / name)
    tokenizer(pieces).save_pretrained(options.out)
    print(f"The model is in {options.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
