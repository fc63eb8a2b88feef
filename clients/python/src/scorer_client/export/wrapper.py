"""What is exported: a model with only the inputs and the output that a worker knows."""

import inspect
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from scorer_client.export.examples import NOT_COUNTED
from scorer_client.export.tasks import Task


class Wrapped(torch.nn.Module):
    """Holds the model as `m`; `scorer package` finds out that prefix of the names."""

    def __init__(self, model: Any, widened: bool) -> None:
        super().__init__()
        self.m = model
        self.widened = widened
        accepts = inspect.signature(model.forward).parameters
        anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepts.values())
        self.options = {"use_cache": False} if "use_cache" in accepts or anything else {}

    def call(self, **inputs: Any) -> Any:
        """If widened, weights of 16 bits are made float32 where they are used, so that every provider can compute them."""
        if not self.widened:
            return self.m(**inputs)
        return functional_call(self.m, {name: weight.float() for name, weight in self.m.named_parameters()}, kwargs=inputs)


class CausalLm(Wrapped):
    def forward(self, input_ids: Any) -> Any:
        return self.call(input_ids=input_ids, **self.options).logits


class MaskedLm(Wrapped):
    def forward(self, input_ids: Any, labels: Any) -> Any:
        return row_losses(self.call(input_ids=input_ids).logits, labels)


class Seq2Seq(Wrapped):
    """Teacher forcing: the decoder reads the labels, shifted by one behind its start token."""

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        config = self.m.config
        shifted = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
        read = torch.where(shifted == NOT_COUNTED, config.pad_token_id, shifted)
        out = self.call(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=read, use_cache=False)
        return row_losses(out.logits, labels)


class ImageClassification(Wrapped):
    def forward(self, pixel_values: Any, labels: Any) -> Any:
        pixels = pixel_values if self.widened else pixel_values.to(self.m.dtype)
        logits = self.call(pixel_values=pixels).logits
        return cross_entropy(logits.float(), labels, reduction="none")


def row_losses(logits: Any, labels: Any) -> Any:
    """The mean cross entropy of each row over the labels that count."""
    each = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=NOT_COUNTED, reduction="none")
    return each.sum(1) / (labels != NOT_COUNTED).sum(1)


def make_plain(model: Any) -> bool:
    """Makes transformers compute attention and mixtures of experts by plain operations; False if that changes nothing."""
    if not isinstance(model, Wrapped):
        return False
    config = model.m.config
    before = (config._attn_implementation, getattr(config, "_experts_implementation", None))
    model.m.set_attn_implementation("eager")
    if before[1] is not None:
        model.m.set_experts_implementation("batched_mm")
    return before != (config._attn_implementation, getattr(config, "_experts_implementation", None))


def wrap(model: Any, task: Task, widened: bool) -> Any:
    match task:
        case Task.CAUSAL_LM:
            return CausalLm(model, widened)
        case Task.MASKED_LM:
            return MaskedLm(model, widened)
        case Task.SEQ2SEQ:
            return Seq2Seq(model, widened)
        case Task.IMAGE_CLASSIFICATION:
            return ImageClassification(model, widened)
        case Task.OWN:
            return model
