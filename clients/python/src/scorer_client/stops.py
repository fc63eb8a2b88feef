"""Early stopping: what a job asks for, and what the score of an evaluation that ended early says."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from scorer_client.fields import Fields

Decision = Literal["worse", "futile"]

ASSUMPTION = (
    "Stopping assumes that no window still to be measured gains more than K times the root mean square of the differences "
    "measured so far. Where one candidate may help a few rare windows very much and hurt the rest, ask for `proven`, or do "
    "not stop."
)


@dataclass(frozen=True)
class Stop:
    """Lets an evaluation end before its plan, once it is decided that delta is below 0 or, if `margin` is above 0, below that.

    A stop is never in a candidate's favour. Of the evaluations whose delta is not below that line, a share of at most
    `alpha` is stopped all the same; `alpha` is above 0 and below 0.5.

    Stopping assumes that no window still to be measured gains more than K times the root mean square of the differences
    measured so far. Where one candidate may help a few rare windows very much and hurt the rest, ask for `proven`, or do
    not stop.

    K = max(8, 2.5 * N^(1/4)) for a plan of N windows. `proven` does without K: a window may then gain as much as the
    largest loss among those still to be measured. It stops later, and only for large harm.
    """

    alpha: float = 0.01
    margin: float = 0.0
    proven: bool = False

    def __post_init__(self) -> None:
        if not is_alpha(self.alpha):
            raise ValueError(f"alpha {self.alpha} of a stop must be above 0 and below 0.5.")
        if not is_margin(self.margin):
            raise ValueError(f"margin {self.margin} of a stop must be a finite number of 0 or more.")

    def fields(self) -> dict[str, Any]:
        """As sent."""
        return {"alpha": float(self.alpha), "margin": float(self.margin), "proven": self.proven}


@dataclass(frozen=True)
class StoppedEarly:
    """Why an evaluation ended after some of the windows `of` its plan.

    `worse`: the plan's delta is below 0. `futile`: it is below `margin`, and may be above 0: that is no harm. `upper` is
    the plan's largest delta that is not excluded at `alpha`. Workers finish a few plans all the same, to check the stops;
    `finished_delta` is then the plan's delta.
    """

    decision: Decision
    alpha: float
    margin: float
    proven: bool
    of: int
    upper: float
    finished_delta: float | None = None

    @classmethod
    def read(cls, fields: Fields) -> "StoppedEarly":
        alpha, margin = fields.number("alpha"), fields.number("margin")
        if not is_alpha(alpha):
            raise fields.wrong("alpha", "above 0 and below 0.5")
        if not is_margin(margin):
            raise fields.wrong("margin", "0 or more")
        return cls(
            decision=_decision(fields),
            alpha=alpha,
            margin=margin,
            proven=fields.flag("proven"),
            of=fields.whole("of"),
            upper=fields.number("upper"),
            finished_delta=fields.part("finished").number("delta") if fields.has("finished") else None,
        )


def is_alpha(number: float) -> bool:
    return 0 < number < 0.5


def is_margin(number: float) -> bool:
    return 0 <= number < math.inf


def _decision(fields: Fields) -> Decision:
    match fields.text("decision"):
        case "worse":
            return "worse"
        case "futile":
            return "futile"
    raise fields.wrong("decision", "worse or futile")
