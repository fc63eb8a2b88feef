"""Makes a model package from a PyTorch model, and proves it: `python3 -m scorer_client export`.

Only the sources (`source`, `huggingface`, `adapter`, `function`), `checkpoint`, `names`, `wrapper`, `graph`, `reference` and
`update` import torch or transformers at once; `command` imports them when the arguments are known to be right.
"""
