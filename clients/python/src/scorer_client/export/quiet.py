"""Silence for libraries that warn of much that does not concern their caller; their errors are exceptions."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
