"""What was there already, for as long as the memory is large."""

from collections import OrderedDict


class Memory:
    """Remembers the latest names, and forgets the oldest for them: a reader that runs for months must not grow."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._names: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self._size:
            self._names.popitem(last=False)
