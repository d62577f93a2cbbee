"""Loading a model and its tokenizer, from a folder first."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zokernels.lab.tasks import hub
from zokernels.lab.tasks.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {"causal": "a causal LM", "masked": "a masked LM", "encoder": "a sentence encoder"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Loaded:
    """A model ready to be scored.

    Attributes:
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer, which has a padding token.
        kind: "causal", "masked" or "encoder".
        notes: Sentences the user should see.
    """

    model: Any
    tokenizer: Any
    kind: str
    notes: list[str]


def load(name: str, dtype: str = "float32") -> Loaded:
    """The model called ``name``: a folder made by ``save_pretrained``, or a hub name.

    Raises:
        InputError: If it cannot be had, or is of no kind that can be scored.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got '{dtype}'.")
    try:
        import transformers
    except ImportError:
        raise InputError(
            "Fine-tuning needs transformers, which is not installed: pip install 'zokernels[hf]'."
        ) from None
    path = Path(located(name)).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path} has no config.json, so it is not a model folder; "
                "pass one made by save_pretrained."
            )
        return _read(transformers, str(path), DTYPES[dtype], cached=True)
    if path.exists() or not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"There is no model folder {name}; pass a folder made by save_pretrained or the name "
            "of a model on the hub."
        )
    try:
        return _read(transformers, name, DTYPES[dtype], cached=True)
    except InputError:
        why = hub.unreachable()
        if why is None:
            return _read(transformers, name, DTYPES[dtype], cached=False)
    raise InputError(
        f"Model '{name}' is neither a folder nor in the local cache of the hub, and the hub was "
        f"not used: {why}."
    )


def located(name: str) -> str:
    """The model's folder where ``name`` is ``package:NAME/FOLDER``, else ``name`` itself.

    Some packages of the Python package index carry weights; such a package is found, not imported.

    Raises:
        InputError: If it is not installed, or has no such folder.
    """
    if not name.startswith("package:"):
        return name
    package, _, inside = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / inside
        if (path / "config.json").is_file():
            return str(path)
    raise InputError(
        f"--model {name}: there is no installed package '{package}' with a model in "
        f"'{inside or '.'}'; install it, or name a folder."
    )


def kind_of(architecture: str) -> str:
    """How a checkpoint with this architecture is scored, by the head that its name says it has."""
    from transformers.models.auto import modeling_auto as auto

    if architecture in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "masked"
    if architecture in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal"
    if architecture in auto.MODEL_MAPPING_NAMES.values():
        return "encoder"
    raise InputError(
        f"A checkpoint of architecture {architecture} cannot be scored; it must be a causal LM, "
        "a masked LM, or an encoder without a head."
    )


def _read(transformers: Any, name: str, dtype: torch.dtype, *, cached: bool) -> Loaded:
    # Code that comes with a model is never run; said outright, since else transformers would ask.
    options: dict[str, Any] = dict(local_files_only=cached, trust_remote_code=False)
    # A damaged folder fails in many ways: OSError, ValueError, the safetensors error, KeyError.
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        kind = kind_of((config.architectures or ["None"])[0])
        factory = {
            "causal": transformers.AutoModelForCausalLM,
            "masked": transformers.AutoModelForMaskedLM,
            "encoder": transformers.AutoModel,
        }[kind]
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        model, info = factory.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **options
        )
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"Model {name} could not be loaded: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"The tokenizer of {name} has no padding, end or unknown token.")
    _check_vocabulary(name, tokenizer, model)
    notes = []
    if missing := sorted(info.get("missing_keys", [])):
        notes.append(
            f"{len(missing)} tensors are not in the checkpoint and start random, "
            f"{missing[0]} among them."
        )
    return Loaded(model.eval(), tokenizer, kind, notes)


def quiet() -> None:
    """Keeps transformers' own progress bars and load reports out of the run's output."""
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _check_vocabulary(name: str, tokenizer: Any, model: Any) -> None:
    """Refuses a tokenizer with tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        token = min(beyond, key=beyond.__getitem__)
        raise InputError(
            f"The tokenizer of {name} does not fit its model: {len(beyond)} of its tokens are "
            f"beyond the {rows} embeddings, '{token}' (number {beyond[token]}) among them; use the "
            "tokenizer that the model was trained with."
        )
