"""What torch and the package were measured to say about the same weights."""

from dataclasses import dataclass

from scorer_client.export.steps import Problem

GRAPH = "report it with the model's config.json: the graph does not compute what the model does"
PLACES = "report it with the model's config.json: a tensor is not where the package has it"
TELLING = 10  # A change of the loss that is less than so many tolerances tells nothing.


@dataclass(frozen=True)
class Comparison:
    """The mean loss over all windows."""

    what: str
    torch: float
    package: float
    tolerance: float

    @property
    def difference(self) -> float:
        return abs(self.torch - self.package)

    def check(self, advice: str) -> None:
        """Not a number is never near enough."""
        if not self.difference <= self.tolerance:
            raise Problem(f"{self}, which is more than {self.tolerance:g}", advice)

    def __str__(self) -> str:
        return f"{self.what}: torch {self.torch:.7f}, package {self.package:.7f}, difference {self.difference:.1e}"


@dataclass(frozen=True)
class Proof:
    baseline: Comparison
    updated: Comparison
    tensors: int
    entries: int

    def check(self) -> None:
        self.baseline.check(GRAPH)
        self.updated.check(PLACES)

    def notes(self) -> list[str]:
        moved = abs(self.updated.torch - self.baseline.torch)
        if moved >= TELLING * self.updated.tolerance:
            return []
        return [f"warning: the random update moves the loss by {moved:.1e} only, so comparing it tells little"]
