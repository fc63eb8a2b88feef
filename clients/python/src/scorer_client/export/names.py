"""Names of parameters that differ between the live model and the checkpoint."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

PEFT_PREFIX = "base_model.model."


def of_transformers(model: Any, saved: Collection[str]) -> dict[str, str]:
    """By the live name: transformers renames some parameters as it loads them, and a tied one has several names.

    A parameter that is made of several tensors keeps its live name.
    """
    found: dict[str, str] = {}
    for live in tied(model):
        known = saved_name(model, live, saved)
        if known is not None:
            found |= {name: known for name in live if name not in saved}
    return found


def merged(model: Any, saved: Collection[str]) -> list[str]:
    """Parameters that the checkpoint has in another form: the experts of a mixture are one tensor in the live model."""
    return [next(iter(live)) for live in tied(model) if saved_name(model, live, saved) is None]


def by_saved_name(model: Any, saved: Collection[str]) -> dict[str, Any]:
    """The live parameters, under the checkpoint's names where it has them in the same form."""
    return {saved_name(model, live, saved) or name: tensor for live in tied(model) for name, tensor in list(live.items())[:1]}


def saved_name(model: Any, live: Mapping[str, Any], saved: Collection[str]) -> str | None:
    """The name in the checkpoint of a parameter with these live names."""
    written = {as_saved(model, name, tensor) for name, tensor in live.items()} | set(live)
    return min((name for name in written if name in saved), default=None)


def of_peft(model: Any, base: Collection[str]) -> dict[str, str]:
    """PEFT puts the adapter's name and `base_layer` into the names, which its own files do not have."""
    import peft

    adapter = {id_of(tensor): name for name, tensor in peft.get_peft_model_state_dict(model).items()}
    plain = model.get_base_model()
    renamed = {}
    for name, tensor in plain.named_parameters(remove_duplicate=False):
        live = f"{PEFT_PREFIX}{name}"
        before = name.replace(".base_layer.", ".")
        saved = adapter.get(id_of(tensor)) or f"{PEFT_PREFIX}{as_saved(plain, before, tensor)}"
        if saved != live and (id_of(tensor) in adapter or saved.removeprefix(PEFT_PREFIX) in base):
            renamed[live] = saved
    return renamed


def tied(model: Any) -> list[Mapping[str, Any]]:
    """The parameters by their names, those of one tensor together."""
    groups: dict[object, dict[str, Any]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id_of(tensor), {})[name] = tensor
    return list(groups.values())


def as_saved(model: Any, name: str, tensor: Any) -> str:
    """The name that `save_pretrained` gives the parameter; its own if it is saved in another form."""
    from transformers.core_model_loading import revert_weight_conversion

    shape_only = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    try:
        written = list(revert_weight_conversion(model, {name: shape_only}))
    except (KeyError, RuntimeError, TypeError, ValueError):  # It is one part of what is saved together.
        return name
    return str(written[0]) if len(written) == 1 else name


def id_of(tensor: Any) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)
