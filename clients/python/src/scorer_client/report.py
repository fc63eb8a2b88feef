"""What the command `score` prints."""

from pathlib import Path

from scorer_client import sketches
from scorer_client.console import counted, print_error, printable
from scorer_client.outcomes import Answer, NotSent, Outcome, TimedOut, Unreadable
from scorer_client.merges import Merged
from scorer_client.refusals import Refusal
from scorer_client.results import Loss, Result, Score
from scorer_client.rounds import Round
from scorer_client.stops import StoppedEarly


class Report:
    """Prints a line for each outcome, and keeps the scores and the answers."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = {name: printable(str(file)) for name, file in files.items()}
        self.scores: dict[str, Score] = {}
        self.answers: list[Answer] = []

    def add(self, outcome: Outcome) -> None:
        match outcome:
            case Answer(None, _):
                pass  # The command's own queue receives the results of other clients too.
            case Answer(_, result) as answer:
                self.answers.append(answer)
                self._line(result.submission_id, verdict_line(result))
                if isinstance(result.verdict, Score):
                    self.scores[result.submission_id] = result.verdict
            case TimedOut(job):
                self._line(job.submission_id, f"timed out  {outcome}")
            case NotSent(job, error):
                self._line(job.submission_id, f"not submitted  {error}")
            case Unreadable(problem):
                print_error(problem)

    def print_copies(self) -> None:
        """Pairs of likely copies, in the order of the command line. Only sketches of the same plan can be compared."""
        for plan in sorted({score.plan for score in self.scores.values()}):
            known = {name: self.scores[name] for name in self._files if name in self.scores}
            of_plan = {name: score.sketch for name, score in known.items() if score.plan == plan and score.sketch is not None}
            for one, other, similarity in sketches.similar_pairs(of_plan):
                print(f"alike  {self._files[one]}  {self._files[other]}  {similarity:.2f} of the changed weights are the same")

    def print_round(self, round: Round) -> None:
        """What the chosen candidates are worth together, and each among them. Raises Unsettled."""
        settled = round.settle()
        if not round.chosen:
            print("merge  there is nothing to merge: no candidate's whole 95 % interval is above 0")
            return
        print(f"merge  joint delta {settled.joint_delta:+.6f}, {len(settled.weights)} of {counted(len(round.chosen), 'chosen candidate')}")
        for id in round.chosen:
            if id in settled.contributions:
                self._line(id, f"contributes {settled.contributions[id]:+.6f}, with weight {settled.weights[id]:.6g}")
        for id in round.negative:
            self._line(id, "left out: its contribution was negative")
        for id, refusal in round.refused.items():
            self._line(id, f"left out: {refusal.code}: {refusal.message}")
        for id in round.crowded_out:
            self._line(id, f"left out: a merge has at most {len(round.chosen)} members")
        if settled.gap.large:
            print(f"gap {settled.gap.value:+.6f} is large: the contributions are a guide, not a measure")

    def _line(self, name: str, line: str) -> None:
        print(f"{self._files[name]}  {printable(line)}", flush=True)


def verdict_line(result: Result) -> str:
    match result.verdict:
        case Score(windows=windows, stopped=StoppedEarly() as stopped):
            return stopped_line(stopped, windows)
        case Score(delta=delta, stderr=None):
            return f"scored  delta {delta:+.6f}"
        case Score(delta=delta, stderr=stderr):
            return f"scored  delta {delta:+.6f} ± {stderr:.6f}"
        case Merged(joint=joint, members=members):
            return f"scored  joint delta {joint.delta:+.6f} of {counted(len(members), 'member')}"
        case Loss(loss=loss):
            return f"scored  loss {loss:.6f}"
        case Refusal(code, message, retryable):
            return f"{result.status}  {code}: {message}{' (may be submitted again)' if retryable else ''}"


def stopped_line(stopped: StoppedEarly, windows: int) -> str:
    """Without the delta of the windows that ran, which is no measurement."""
    asked = f"alpha {stopped.alpha:g}, margin {stopped.margin:g}" if stopped.margin else f"alpha {stopped.alpha:g}"
    asked += ", proven" if stopped.proven else ""
    bound = f"stopped  {stopped.decision}: delta at most {stopped.upper:+.6f} ({asked})"
    finished = stopped.finished_delta
    checked = "" if finished is None else f"; finished to check the stop: delta {finished:+.6f}"
    return f"{bound}, after {windows} of {stopped.of} windows{checked}"
