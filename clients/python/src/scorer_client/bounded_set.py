"""A set of limited size."""

from collections import OrderedDict


class BoundedSet:
    """Keeps the most recently added names and drops the oldest, so that a client that runs for months does not grow."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._names: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self._max_size:
            self._names.popitem(last=False)
