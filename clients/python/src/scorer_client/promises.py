"""What a job's caller waits for: a future of a thread or of an event loop."""

import asyncio
import concurrent.futures
from typing import Protocol

from scorer_client.results import Result


class Promise(Protocol):
    """Kept at most once."""

    def cancelled(self) -> bool:
        """Has the caller cancelled it?"""

    def claim(self) -> bool:
        """False if the caller has cancelled it. Called before its job is sent."""

    def keep(self, result: Result) -> None: ...

    def fail(self, error: Exception) -> None: ...


class ThreadPromise:
    """A job that was sent can no longer be cancelled: `Future.cancel` then returns False."""

    def __init__(self) -> None:
        self.future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._claimed: bool | None = None

    def cancelled(self) -> bool:
        return self.future.cancelled()

    def claim(self) -> bool:
        if self._claimed is None:
            self._claimed = self.future.set_running_or_notify_cancel()
        return self._claimed

    def keep(self, result: Result) -> None:
        if self.claim() and not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        if self.claim() and not self.future.done():
            self.future.set_exception(error)


class TaskPromise:
    """A job that was sent can be cancelled too: its result is then for the handler alone."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    def cancelled(self) -> bool:
        return self.future.cancelled()

    def claim(self) -> bool:
        return not self.future.cancelled()

    def keep(self, result: Result) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # Whoever has a handler need not look at the future: asyncio would complain.
