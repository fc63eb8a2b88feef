"""What a model is for, and so how its loss is computed and what its shards hold."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from scorer_client.export.steps import USAGE, Problem


class Task(Enum):
    """`CAUSAL_LM` gives logits to the worker, which computes the loss; the graphs of the others give the loss of each row."""

    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    SEQ2SEQ = "seq2seq"
    IMAGE_CLASSIFICATION = "image-classification"
    OWN = "own"  # A module that computes its loss by itself.

    @property
    def objective(self) -> str:
        """The word of `scorer package --objective`."""
        return "causal_lm" if self is Task.CAUSAL_LM else "graph_loss"

    @property
    def reads_text(self) -> bool:
        """Whether shards can be made from text."""
        return self in (Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ)


# The ends of class names in transformers, as `architectures` in config.json has them.
CLASSES = {
    "ForCausalLM": Task.CAUSAL_LM,
    "LMHeadModel": Task.CAUSAL_LM,
    "ForMaskedLM": Task.MASKED_LM,
    "ForConditionalGeneration": Task.SEQ2SEQ,
    "ForImageClassification": Task.IMAGE_CLASSIFICATION,
}
# Where configurations say how many positions a model has.
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
USUAL_WINDOW = 128


def task_of(config: Mapping[str, Any]) -> Task:
    """By the class that config.json names; a model without one is taken for a causal language model."""
    names = config.get("architectures") or []
    for name in names:
        for end, task in CLASSES.items():
            if str(name).endswith(end):
                return task
    if not names:
        return Task.CAUSAL_LM
    raise Problem(
        f"config.json says {', '.join(map(str, names))}, whose loss is not known",
        "set --task, or write a function that returns a module with the output `loss` and give it as package.module:function",
        USAGE,
    )


def window_limit(config: Mapping[str, Any]) -> int | None:
    """How many positions the model has; None if it does not say, or counts them relative to each other (T5)."""
    if config.get("relative_attention_num_buckets"):
        return None
    # Some configurations write -1 or 0 for "no limit".
    found = [config[key] for key in LIMITS if isinstance(config.get(key), int) and config[key] > 0]
    return min(found, default=None)


def window_of(wanted: int | None, limit: int | None) -> int:
    """The wanted window if the model can read it; without a wish, 128 or what the model can read."""
    if wanted is None:
        return USUAL_WINDOW if limit is None else min(USUAL_WINDOW, limit)
    if limit is not None and wanted > limit:
        raise Problem(f"--window {wanted}: the model has {limit} positions", f"set --window {limit} or less", USAGE)
    return wanted
