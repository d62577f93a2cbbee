"""A model cut over processes by FSDP2, and whole again to be saved."""

from __future__ import annotations

from typing import Any

from zokernels.lab.models import families


def shard(model: Any) -> Any:
    """Cuts a model's layers, and the rest of it, over all processes, in place.

    Args:
        model: A transformers model, perhaps inside an adapter.

    Raises:
        InputError: If the table of families does not know where its layers are.
    """
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.get_submodule(families.of(base).layers):
        fully_shard(layer)
    return fully_shard(model)


def whole(model: Any) -> dict[str, Any]:
    """The weights of a model that is cut, on the CPU of the first process; called in every one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_model_state_dict(model, options=options)
    # A weight of two names is one again, as what saves it expects.
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name and name in found:
            found[name] = found[first[id(p)]]
    return found
