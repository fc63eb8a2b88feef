"""Makes a model package from a PyTorch model, and proves it: `python3 -m scorer_client export`.

Only `wrapper`, `graph`, `checkpoint`, `source`, `reference` and `update` import torch, and only `source` and `tokenizer`
import transformers; `command` imports them when the arguments are known to be right.
"""
