//! The state machine of a worker's life, without I/O: what each request leads to in each activity, and
//! what each interruption of serving leads to. The module `run` performs it.

use super::heartbeat::NameClaim;
use super::parts::Part;
use crate::engine::thread::EngineHandle;
use crate::protocol::control::Command;
use crate::protocol::state::{Detail, State};
use crate::scoring::consumer::ServeEnd;
use crate::update::PreparedUpdate;

const DRAINING: &str =
    "draining: jobs that can finish in time are answered, the rest are handed back";
pub(super) const PAUSED: &str = "paused: no jobs are taken";
const RESUMED: &str = "no longer paused";
const NOT_PAUSED: &str = "was not paused";
const WARMING_UP: &str = "the worker is warming up; ask again when that is over";

/// Why the worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Every job that it held was answered or handed back.
    Drained,
    /// A computation was cut short at the drain's deadline.
    CutShort,
    /// The device did not return from a terminated run; only the end of the process frees it.
    Stuck,
    /// A part that the worker cannot do without has ended.
    PartLost(Part),
}

/// What the worker is doing when a request arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activity {
    /// Taking jobs, or finishing those that it holds.
    Serving,
    /// Waiting for an obstacle to go away, or for a back-off to pass.
    Waiting,
    /// Loading or proving a model.
    Warming,
}

/// What the worker can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// The process was told to end.
    Signal,
    /// A control message.
    Command(Command),
    /// Reload the package, which was checked and is sound.
    Reload,
    /// Stop: this part has ended.
    PartLost(Part),
}

/// Why the worker stops taking jobs, other than a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interruption<U = Box<PreparedUpdate>> {
    /// Another live worker uses the same name.
    NameTaken,
    /// The updater offers this version.
    UpdateOffered(u64, U),
    /// The audit found a difference.
    AuditFailed(Detail),
    /// There is no cache to fetch candidates into.
    FetcherFailed,
    /// The consumer, or its registration, ended.
    ServeEnded(ServeEnd),
}

/// What the worker does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next<U = Box<PreparedUpdate>> {
    /// Serve again, if nothing stands in the way.
    Again,
    /// The same after a back-off.
    Retry(Retry),
    /// Prove the same session again.
    Rewarm,
    /// Load the model again.
    Reload,
    /// Serve other weights.
    Swap(U),
    /// End.
    Stop(Stop),
}

/// Which back-off applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    /// The consumer could not be registered, or was lost.
    Registering,
    /// The broker refuses our publishes. Each try costs a job one of the returns that the broker
    /// counts.
    Publishing,
}

/// A change of state, and what follows it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Transition<U = Box<PreparedUpdate>> {
    /// Absent where what follows sets the state.
    pub(super) to: Option<(State, Detail)>,
    pub(super) next: Next<U>,
}

/// Who tells the sender of a request what became of it, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// Nobody waits for an answer.
    Nobody,
    /// At once: done.
    Done(&'static str),
    /// At once: refused.
    Refused(&'static str),
    /// When the state has changed: paused.
    AfterTransition,
    /// The end of the next warm-up.
    AfterWarmUp,
    /// The check of the package, which asks for the reload if the package is sound.
    PackageCheck,
    /// The updater.
    Updater,
}

/// What a request leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Response<U = Box<PreparedUpdate>> {
    pub(super) paused: bool,
    pub(super) reply: Reply,
    /// Absent where the worker carries on.
    pub(super) transition: Option<Transition<U>>,
}

impl<U> Transition<U> {
    fn to(state: State, detail: Detail, next: Next<U>) -> Self {
        Self {
            to: Some((state, detail)),
            next,
        }
    }

    fn degraded(detail: Detail, next: Next<U>) -> Self {
        Self::to(State::Degraded, detail, next)
    }

    fn is_stop(&self) -> bool {
        matches!(self.next, Next::Stop(_))
    }
}

/// What a request leads to for a worker that does this, and that is `paused` or not.
pub(super) fn respond<U>(activity: Activity, paused: bool, ask: Ask) -> Response<U> {
    let asked = while_serving(paused, ask);
    match activity {
        Activity::Serving => asked,
        Activity::Waiting => while_waiting(asked),
        Activity::Warming => while_warming(asked),
    }
}

fn while_serving<U>(paused: bool, ask: Ask) -> Response<U> {
    let stop = |detail, stop| Some(Transition::to(State::Draining, detail, Next::Stop(stop)));
    let (reply, transition) = match ask {
        Ask::Signal => (Reply::Nobody, stop(Detail::DrainSignal, Stop::Drained)),
        Ask::PartLost(part) => (Reply::Nobody, stop(Detail::PartLost, Stop::PartLost(part))),
        Ask::Reload => {
            let (state, detail) = (State::Reloading, Detail::ReloadRequest);
            let transition = Transition::to(state, detail, Next::Reload);
            (Reply::AfterWarmUp, Some(transition))
        }
        Ask::Command(Command::Drain) => {
            let transition = stop(Detail::DrainControl, Stop::Drained);
            (Reply::Done(DRAINING), transition)
        }
        Ask::Command(Command::Pause) => {
            let transition = Transition::degraded(Detail::Paused, Next::Again);
            (Reply::AfterTransition, Some(transition))
        }
        Ask::Command(Command::Resume) => {
            let message = if paused { RESUMED } else { NOT_PAUSED };
            (Reply::Done(message), None)
        }
        Ask::Command(Command::Rewarm) => {
            let transition = Transition::to(State::Warming, Detail::Rewarm, Next::Rewarm);
            (Reply::AfterWarmUp, Some(transition))
        }
        Ask::Command(Command::Reload) => (Reply::PackageCheck, None),
        Ask::Command(Command::Update) => (Reply::Updater, None),
    };
    Response {
        paused: paused_after(ask, paused),
        reply,
        transition,
    }
}

fn paused_after(ask: Ask, paused: bool) -> bool {
    match ask {
        Ask::Command(Command::Pause) => true,
        Ask::Command(Command::Resume) => false,
        Ask::Command(Command::Drain | Command::Rewarm | Command::Reload | Command::Update)
        | Ask::Signal
        | Ask::Reload
        | Ask::PartLost(_) => paused,
    }
}

/// Every request ends the wait. What follows sets the state, except for a stop.
fn while_waiting<U>(asked: Response<U>) -> Response<U> {
    let transition = match asked.transition {
        Some(stop) if stop.is_stop() => stop,
        Some(Transition { next, .. }) => Transition { to: None, next },
        None => Transition {
            to: None,
            next: Next::Again,
        },
    };
    Response {
        transition: Some(transition),
        ..asked
    }
}

/// Only a stop ends a warm-up; a pause is remembered, a reload is refused.
fn while_warming<U>(asked: Response<U>) -> Response<U> {
    let reply = match &asked.transition {
        Some(stop) if stop.is_stop() => return asked,
        Some(Transition {
            next: Next::Reload, ..
        }) => Reply::Refused(WARMING_UP),
        Some(_) | None => asked.reply,
    };
    Response {
        reply,
        transition: None,
        ..asked
    }
}

/// What an interruption of serving leads to.
pub(super) fn after<U>(interruption: Interruption<U>) -> Transition<U> {
    match interruption {
        Interruption::NameTaken => Transition::degraded(Detail::DuplicateId, Next::Again),
        Interruption::UpdateOffered(version, update) => {
            let detail = Detail::UpdateTo(version);
            Transition::to(State::Updating, detail, Next::Swap(update))
        }
        Interruption::AuditFailed(detail) => Transition::degraded(detail, Next::Reload),
        Interruption::FetcherFailed => {
            Transition::degraded(Detail::ModelLoadFailed, Next::Retry(Retry::Registering))
        }
        Interruption::ServeEnded(ended) => after_serving(ended),
    }
}

fn after_serving<U>(ended: ServeEnd) -> Transition<U> {
    match ended {
        ServeEnd::Cleared => Transition::to(State::Ready, Detail::Serving, Next::Again),
        ServeEnd::Stalled => Transition::degraded(Detail::Stuck, Next::Reload),
        ServeEnd::BrokerLost => Transition::degraded(Detail::BrokerDisconnected, Next::Again),
        ServeEnd::Forbidden => {
            Transition::degraded(Detail::PublishForbidden, Next::Retry(Retry::Publishing))
        }
        ServeEnd::ConsumerLost => {
            Transition::degraded(Detail::ConsumerLost, Next::Retry(Retry::Registering))
        }
        ServeEnd::EngineLost(Detail::Stuck) => {
            Transition::degraded(Detail::Stuck, Next::Stop(Stop::Stuck))
        }
        ServeEnd::EngineLost(detail) => Transition::degraded(detail, Next::Reload),
    }
}

/// What the worker does after finishing its jobs, if it was going to do `then` and is asked for
/// something else meanwhile. The larger change wins: a swap and a reload prove the session too, and
/// a reload makes a swap obsolete. A stop is final.
pub(super) fn merge<U>(then: Next<U>, asked: Next<U>) -> Next<U> {
    match (then, asked) {
        (stop @ Next::Stop(_), _) => stop,
        (Next::Reload, Next::Again | Next::Retry(_) | Next::Rewarm) => Next::Reload,
        (Next::Swap(update), Next::Again | Next::Retry(_) | Next::Rewarm) => Next::Swap(update),
        (Next::Rewarm, Next::Again | Next::Retry(_)) => Next::Rewarm,
        (Next::Again | Next::Retry(_) | Next::Rewarm | Next::Reload | Next::Swap(_), asked) => {
            asked
        }
    }
}

impl<U> Next<U> {
    /// What the worker does instead if a computation was cut short: a drain says so.
    pub(super) fn cut_short(self) -> Self {
        match self {
            Self::Stop(Stop::Drained) => Self::Stop(Stop::CutShort),
            next @ (Self::Again
            | Self::Retry(_)
            | Self::Rewarm
            | Self::Reload
            | Self::Swap(_)
            | Self::Stop(Stop::CutShort | Stop::Stuck | Stop::PartLost(_))) => next,
        }
    }
}

/// The model that the worker scores with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Model<E = EngineHandle> {
    /// To be loaded.
    Absent,
    /// Loaded, to be proven (again).
    Unproven(E),
    /// Proven.
    Warm(E),
}

impl<E: Clone> Model<E> {
    pub(super) fn engine(&self) -> Option<E> {
        match self {
            Self::Absent => None,
            Self::Unproven(engine) | Self::Warm(engine) => Some(engine.clone()),
        }
    }
}

impl<E> Model<E> {
    /// The model to go on with.
    ///
    /// # Errors
    /// How the worker ends, if it does.
    pub(super) fn followed_by<U>(self, next: Next<U>) -> Result<Self, Stop> {
        match (next, self) {
            (Next::Again | Next::Retry(_) | Next::Swap(_), model) => Ok(model),
            (Next::Rewarm, Self::Warm(engine) | Self::Unproven(engine)) => {
                Ok(Self::Unproven(engine))
            }
            (Next::Rewarm, Self::Absent) | (Next::Reload, _) => Ok(Self::Absent),
            (Next::Stop(stop), _) => Err(stop),
        }
    }
}

/// Why a warm worker takes no jobs, if it must not: the reason that people can remove first.
pub(super) fn obstacle(paused: bool, claim: NameClaim, linked: bool) -> Option<Detail> {
    match (paused, claim, linked) {
        (true, _, _) => Some(Detail::Paused),
        (false, NameClaim::Taken, _) => Some(Detail::DuplicateId),
        (false, NameClaim::Unknown | NameClaim::Ours, false) => Some(Detail::BrokerDisconnected),
        (false, NameClaim::Unknown | NameClaim::Ours, true) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers stand for the weights of an update.
    type Id = u64;

    /// All of them, in the order of the table. A new one breaks the match, so that it is listed, too.
    fn asks() -> [(Ask, &'static str); 9] {
        [
            Ask::Signal,
            Ask::PartLost(Part::Link),
            Ask::Reload,
            Ask::Command(Command::Drain),
            Ask::Command(Command::Pause),
            Ask::Command(Command::Resume),
            Ask::Command(Command::Rewarm),
            Ask::Command(Command::Reload),
            Ask::Command(Command::Update),
        ]
        .map(|ask| match ask {
            Ask::Signal => (ask, "signal"),
            Ask::PartLost(_) => (ask, "part lost"),
            Ask::Reload => (ask, "sound package"),
            Ask::Command(
                command @ (Command::Drain
                | Command::Pause
                | Command::Resume
                | Command::Rewarm
                | Command::Reload
                | Command::Update),
            ) => (ask, command.as_str()),
        })
    }

    fn words(next: &Next<Id>) -> String {
        format!("{next:?}").to_lowercase()
    }

    fn cell(transition: &Transition<Id>) -> String {
        let next = words(&transition.next);
        match transition.to {
            Some((state, detail)) => format!("{}/{detail}, {next}", state.as_str()),
            None => next,
        }
    }

    fn row(activity: Activity, paused: bool, ask: Ask) -> String {
        let response: Response<Id> = respond(activity, paused, ask);
        let transition = response.transition.as_ref().map_or("carry on".into(), cell);
        let reply = match response.reply {
            Reply::Nobody => String::new(),
            Reply::Done(message) => format!("; done: {message}"),
            Reply::Refused(message) => format!("; refused: {message}"),
            Reply::AfterTransition => "; then answer".into(),
            Reply::AfterWarmUp => "; the warm-up answers".into(),
            Reply::PackageCheck => "; the check answers".into(),
            Reply::Updater => "; the updater answers".into(),
        };
        let pause = match (paused, response.paused) {
            (false, true) => " -> paused",
            (true, false) => " -> not paused",
            (true, true) => " (stays paused)",
            (false, false) => "",
        };
        format!("{transition}{reply}{pause}")
    }

    /// Every request in every activity, first not paused; where it differs, paused.
    const RESPONSES: &str = "\
signal
  serving: draining/drain_signal, stop(drained)
  waiting: draining/drain_signal, stop(drained)
  warming: draining/drain_signal, stop(drained)
part lost
  serving: draining/part_lost, stop(partlost(link))
  waiting: draining/part_lost, stop(partlost(link))
  warming: draining/part_lost, stop(partlost(link))
sound package
  serving: reloading/reload_request, reload; the warm-up answers
  waiting: reload; the warm-up answers
  warming: carry on; refused: the worker is warming up; ask again when that is over
drain
  serving: draining/drain_control, stop(drained); done: DRAINING
  waiting: draining/drain_control, stop(drained); done: DRAINING
  warming: draining/drain_control, stop(drained); done: DRAINING
pause
  serving: degraded/paused, again; then answer -> paused
  waiting: again; then answer -> paused
  warming: carry on; then answer -> paused
resume
  serving: carry on; done: was not paused
    if paused: carry on; done: no longer paused -> not paused
  waiting: again; done: was not paused
    if paused: again; done: no longer paused -> not paused
  warming: carry on; done: was not paused
    if paused: carry on; done: no longer paused -> not paused
rewarm
  serving: warming/rewarm, rewarm; the warm-up answers
  waiting: rewarm; the warm-up answers
  warming: carry on; the warm-up answers
reload
  serving: carry on; the check answers
  waiting: again; the check answers
  warming: carry on; the check answers
update
  serving: carry on; the updater answers
  waiting: again; the updater answers
  warming: carry on; the updater answers
";

    #[test]
    fn every_request_in_every_activity() {
        let mut found = String::new();
        for (ask, name) in asks() {
            found.push_str(&format!("{name}\n"));
            for activity in [Activity::Serving, Activity::Waiting, Activity::Warming] {
                let running = row(activity, false, ask);
                let paused = row(activity, true, ask);
                let activity = format!("{activity:?}").to_lowercase();
                found.push_str(&format!("  {activity}: {running}\n"));
                let same = paused.trim_end_matches(" (stays paused)");
                if same != running.trim_end_matches(" -> paused") {
                    found.push_str(&format!("    if paused: {paused}\n"));
                }
            }
        }
        let found = found.replace(DRAINING, "DRAINING");
        for (found, expected) in found.lines().zip(RESPONSES.lines()) {
            assert_eq!(found, expected);
        }
        assert_eq!(found, RESPONSES);
    }

    #[test]
    fn what_each_interruption_of_serving_leads_to() {
        let ended = |ended| Interruption::ServeEnded(ended);
        let lost = |detail| Interruption::ServeEnded(ServeEnd::EngineLost(detail));
        let (changed, memory) = (Detail::PackageChanged, Detail::OutOfMemory);
        let table: [(Interruption<Id>, &str); 12] = [
            (Interruption::NameTaken, "degraded/duplicate_id, again"),
            (
                Interruption::UpdateOffered(8, 1),
                "updating/update_to_v8, swap(1)",
            ),
            (
                Interruption::AuditFailed(changed),
                "degraded/package_changed, reload",
            ),
            (
                Interruption::FetcherFailed,
                "degraded/model_load_failed, retry(registering)",
            ),
            (ended(ServeEnd::Cleared), "ready/serving, again"),
            (ended(ServeEnd::Stalled), "degraded/stuck, reload"),
            (
                ended(ServeEnd::ConsumerLost),
                "degraded/consumer_lost, retry(registering)",
            ),
            (
                ended(ServeEnd::BrokerLost),
                "degraded/broker_disconnected, again",
            ),
            (
                ended(ServeEnd::Forbidden),
                "degraded/publish_forbidden, retry(publishing)",
            ),
            (lost(Detail::Stuck), "degraded/stuck, stop(stuck)"),
            (lost(Detail::EngineLost), "degraded/engine_lost, reload"),
            (lost(memory), "degraded/out_of_memory, reload"),
        ];
        for (interruption, expected) in table {
            assert_eq!(cell(&after(interruption)), expected, "{interruption:?}");
        }
    }

    const NEXT: [Next<Id>; 7] = [
        Next::Again,
        Next::Retry(Retry::Registering),
        Next::Retry(Retry::Publishing),
        Next::Rewarm,
        Next::Reload,
        Next::Swap(1),
        Next::Stop(Stop::Drained),
    ];

    /// A row for what the worker was going to do, a column for what it is asked meanwhile. No request
    /// leads to a back-off.
    const MERGED: &str = "\
then                 again          rewarm         reload         swap(2)        stop(stuck)
again                again          rewarm         reload         swap(2)        stop(stuck)
retry(registering)   again          rewarm         reload         swap(2)        stop(stuck)
retry(publishing)    again          rewarm         reload         swap(2)        stop(stuck)
rewarm               rewarm         rewarm         reload         swap(2)        stop(stuck)
reload               reload         reload         reload         swap(2)        stop(stuck)
swap(1)              swap(1)        swap(1)        reload         swap(2)        stop(stuck)
stop(drained)        stop(drained)  stop(drained)  stop(drained)  stop(drained)  stop(drained)
";

    #[test]
    fn the_larger_of_two_changes_wins() {
        let stuck = Next::Stop(Stop::Stuck);
        let asked = [
            Next::Again,
            Next::Rewarm,
            Next::Reload,
            Next::Swap(2),
            stuck,
        ];
        let mut rows = MERGED.lines().map(|row| row.split_whitespace().collect());
        let head: Vec<&str> = rows.next().unwrap();
        assert_eq!(head[1..], asked.map(|asked| words(&asked)));
        let found: Vec<Vec<String>> = NEXT
            .iter()
            .map(|then| {
                [*then]
                    .into_iter()
                    .chain(asked.map(|asked| merge(*then, asked)))
            })
            .map(|row| row.map(|next| words(&next)).collect())
            .collect();
        assert_eq!(found, rows.collect::<Vec<_>>());
    }

    #[test]
    fn only_a_drain_that_cuts_a_computation_short_says_so() {
        for next in NEXT {
            let expected = match next {
                Next::Stop(_) => Next::Stop(Stop::CutShort),
                next @ (Next::Again
                | Next::Retry(_)
                | Next::Rewarm
                | Next::Reload
                | Next::Swap(_)) => next,
            };
            assert_eq!(next.cut_short(), expected);
        }
        for stop in [Stop::CutShort, Stop::Stuck, Stop::PartLost(Part::Link)] {
            assert_eq!(Next::<Id>::Stop(stop).cut_short(), Next::Stop(stop));
        }
    }

    #[test]
    fn the_model_that_follows_each_step() {
        let (absent, unproven, warm) = (Model::Absent, Model::Unproven("s"), Model::Warm("s"));
        let models = [absent.clone(), unproven.clone(), warm];
        let kept = models.clone().map(Ok);
        let rewarmed = [Ok(absent.clone()), Ok(unproven.clone()), Ok(unproven)];
        let reloaded = [Ok(absent.clone()), Ok(absent.clone()), Ok(absent)];
        let stopped = [const { Err(Stop::Drained) }; 3];
        for next in NEXT {
            let expected = match next {
                Next::Again | Next::Retry(_) | Next::Swap(_) => &kept,
                Next::Rewarm => &rewarmed,
                Next::Reload => &reloaded,
                Next::Stop(_) => &stopped,
            };
            let found = models.clone().map(|model| model.followed_by(next));
            assert_eq!(&found, expected, "{next:?}");
        }
    }

    #[test]
    fn what_keeps_a_warm_worker_from_taking_jobs() {
        let (paused, broker) = (Some(Detail::Paused), Some(Detail::BrokerDisconnected));
        let taken = Some(Detail::DuplicateId);
        // For each claim: without a link, with one, and the same while paused.
        let table = [
            (NameClaim::Unknown, [broker, None, paused, paused]),
            (NameClaim::Ours, [broker, None, paused, paused]),
            (NameClaim::Taken, [taken, taken, paused, paused]),
        ];
        for (claim, expected) in table {
            let found = [(false, false), (false, true), (true, false), (true, true)]
                .map(|(paused, linked)| obstacle(paused, claim, linked));
            assert_eq!(found, expected, "{claim:?}");
        }
    }
}
