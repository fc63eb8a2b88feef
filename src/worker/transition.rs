//! The state machine of a worker's life, without I/O: what each request and each event leads to.
//! [`run`](super::run) performs it.

use super::heartbeat::NameClaim;
use super::parts::Part;
use crate::engine::thread::EngineHandle;
use crate::protocol::control::Command;
use crate::protocol::state::{Detail, State};
use crate::scoring::consumer::ServeEnd;
use crate::update::PreparedUpdate;

pub(super) const DRAINING: &str =
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
pub(super) enum Event<U = Box<PreparedUpdate>> {
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
    let paused = match ask {
        Ask::Command(Command::Pause) => true,
        Ask::Command(Command::Resume) => false,
        Ask::Command(Command::Drain | Command::Rewarm | Command::Reload | Command::Update)
        | Ask::Signal
        | Ask::Reload
        | Ask::PartLost(_) => paused,
    };
    Response {
        paused,
        reply,
        transition,
    }
}

/// Every request ends the wait. What follows sets the state, except for a stop.
fn while_waiting<U>(asked: Response<U>) -> Response<U> {
    let transition = match asked.transition {
        Some(
            transition @ Transition {
                next: Next::Stop(_),
                ..
            },
        ) => transition,
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
    match asked.transition {
        Some(Transition {
            next: Next::Stop(_),
            ..
        }) => asked,
        Some(Transition {
            next: Next::Reload, ..
        }) => Response {
            reply: Reply::Refused(WARMING_UP),
            transition: None,
            ..asked
        },
        Some(_) | None => Response {
            transition: None,
            ..asked
        },
    }
}

/// What an event leads to that ends serving.
pub(super) fn after<U>(event: Event<U>) -> Transition<U> {
    match event {
        Event::NameTaken => Transition::degraded(Detail::DuplicateId, Next::Again),
        Event::UpdateOffered(version, update) => {
            let detail = Detail::UpdateTo(version);
            Transition::to(State::Updating, detail, Next::Swap(update))
        }
        Event::AuditFailed(detail) => Transition::degraded(detail, Next::Reload),
        Event::FetcherFailed => {
            Transition::degraded(Detail::ModelLoadFailed, Next::Retry(Retry::Registering))
        }
        Event::ServeEnded(ended) => after_serving(ended),
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

    /// Weights that an update offers are told apart by a number here.
    type Id = u64;
    const PART: Part = Part::Link;

    fn words<U: std::fmt::Debug>(next: &Next<U>) -> String {
        format!("{next:?}").to_lowercase()
    }

    fn step(transition: &Transition<Id>) -> String {
        let next = words(&transition.next);
        match transition.to {
            Some((state, detail)) => format!("{}/{detail}, {next}", state.as_str()),
            None => next,
        }
    }

    fn reply(reply: Reply) -> String {
        match reply {
            Reply::Nobody => String::new(),
            Reply::Done(message) => format!(" (done: {message})"),
            Reply::Refused(message) => format!(" (refused: {message})"),
            Reply::AfterTransition => " (then: paused)".into(),
            Reply::AfterWarmUp => " (after the warm-up)".into(),
            Reply::PackageCheck => " (by the check)".into(),
            Reply::Updater => " (by the updater)".into(),
        }
    }

    fn response(activity: Activity, paused: bool, ask: Ask) -> String {
        let response: Response<Id> = respond(activity, paused, ask);
        let step = response.transition.as_ref().map_or("go on".into(), step);
        let pause = match (paused, response.paused) {
            (false, true) => ", paused from now on",
            (true, false) => ", no longer paused",
            (true, true) | (false, false) => "",
        };
        format!("{step}{pause}{}", reply(response.reply))
    }

    const ASKS: [Ask; 9] = [
        Ask::Signal,
        Ask::PartLost(PART),
        Ask::Reload,
        Ask::Command(Command::Drain),
        Ask::Command(Command::Pause),
        Ask::Command(Command::Resume),
        Ask::Command(Command::Rewarm),
        Ask::Command(Command::Reload),
        Ask::Command(Command::Update),
    ];

    /// What each of `ASKS` leads to, in their order.
    fn responses(activity: Activity, paused: bool) -> [String; 9] {
        // A new request needs a column: this match does not compile until it is listed.
        for (at, ask) in ASKS.into_iter().enumerate() {
            let listed = match ask {
                Ask::Signal => 0,
                Ask::PartLost(_) => 1,
                Ask::Reload => 2,
                Ask::Command(Command::Drain) => 3,
                Ask::Command(Command::Pause) => 4,
                Ask::Command(Command::Resume) => 5,
                Ask::Command(Command::Rewarm) => 6,
                Ask::Command(Command::Reload) => 7,
                Ask::Command(Command::Update) => 8,
            };
            assert_eq!(listed, at);
        }
        ASKS.map(|ask| response(activity, paused, ask))
    }

    const STOPS: [&str; 2] = [
        "draining/drain_signal, stop(drained)",
        "draining/part_lost, stop(partlost(link))",
    ];
    const DRAIN: &str = "draining/drain_control, stop(drained) (done: draining: jobs that can \
                         finish in time are answered, the rest are handed back)";

    #[test]
    fn what_each_request_does_to_a_worker_that_serves() {
        let [signal, part] = STOPS;
        assert_eq!(
            responses(Activity::Serving, false),
            [
                signal,
                part,
                "reloading/reload_request, reload (after the warm-up)",
                DRAIN,
                "degraded/paused, again, paused from now on (then: paused)",
                "go on (done: was not paused)",
                "warming/rewarm, rewarm (after the warm-up)",
                "go on (by the check)",
                "go on (by the updater)",
            ]
        );
        // A paused worker may still be finishing its jobs.
        assert_eq!(
            responses(Activity::Serving, true),
            [
                signal,
                part,
                "reloading/reload_request, reload (after the warm-up)",
                DRAIN,
                "degraded/paused, again (then: paused)",
                "go on, no longer paused (done: no longer paused)",
                "warming/rewarm, rewarm (after the warm-up)",
                "go on (by the check)",
                "go on (by the updater)",
            ]
        );
    }

    #[test]
    fn what_each_request_does_to_a_worker_that_waits() {
        let [signal, part] = STOPS;
        assert_eq!(
            responses(Activity::Waiting, false),
            [
                signal,
                part,
                "reload (after the warm-up)",
                DRAIN,
                "again, paused from now on (then: paused)",
                "again (done: was not paused)",
                "rewarm (after the warm-up)",
                "again (by the check)",
                "again (by the updater)",
            ]
        );
        assert_eq!(
            responses(Activity::Waiting, true),
            [
                signal,
                part,
                "reload (after the warm-up)",
                DRAIN,
                "again (then: paused)",
                "again, no longer paused (done: no longer paused)",
                "rewarm (after the warm-up)",
                "again (by the check)",
                "again (by the updater)",
            ]
        );
    }

    #[test]
    fn what_each_request_does_to_a_worker_that_warms_up() {
        let [signal, part] = STOPS;
        let refused = "go on (refused: the worker is warming up; ask again when that is over)";
        assert_eq!(
            responses(Activity::Warming, false),
            [
                signal,
                part,
                refused,
                DRAIN,
                "go on, paused from now on (then: paused)",
                "go on (done: was not paused)",
                "go on (after the warm-up)",
                "go on (by the check)",
                "go on (by the updater)",
            ]
        );
        assert_eq!(
            responses(Activity::Warming, true),
            [
                signal,
                part,
                refused,
                DRAIN,
                "go on (then: paused)",
                "go on, no longer paused (done: no longer paused)",
                "go on (after the warm-up)",
                "go on (by the check)",
                "go on (by the updater)",
            ]
        );
    }

    #[test]
    fn where_each_event_that_ends_serving_leads() {
        let ended = Event::ServeEnded;
        let table: [(Event<Id>, &str); 13] = [
            (Event::NameTaken, "degraded/duplicate_id, again"),
            (Event::UpdateOffered(8, 1), "updating/update_to_v8, swap(1)"),
            (
                Event::AuditFailed(Detail::PackageChanged),
                "degraded/package_changed, reload",
            ),
            (
                Event::AuditFailed(Detail::RestoreMismatch),
                "degraded/restore_mismatch, reload",
            ),
            (
                Event::FetcherFailed,
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
            (
                ended(ServeEnd::EngineLost(Detail::Stuck)),
                "degraded/stuck, stop(stuck)",
            ),
            (
                ended(ServeEnd::EngineLost(Detail::EngineLost)),
                "degraded/engine_lost, reload",
            ),
            (
                ended(ServeEnd::EngineLost(Detail::OutOfMemory)),
                "degraded/out_of_memory, reload",
            ),
        ];
        for (event, expected) in table {
            assert_eq!(step(&after(event)), expected, "{event:?}");
        }
    }

    const FROM_SERVING: [Next<Id>; 7] = [
        Next::Again,
        Next::Retry(Retry::Registering),
        Next::Retry(Retry::Publishing),
        Next::Rewarm,
        Next::Reload,
        Next::Swap(1),
        Next::Stop(Stop::Drained),
    ];

    #[test]
    fn the_larger_of_two_changes_wins() {
        let asked = [
            Next::Again,
            Next::Rewarm,
            Next::Reload,
            Next::Swap(2),
            Next::Stop(Stop::Stuck),
        ];
        let table: [(Next<Id>, [&str; 5]); 7] = [
            (
                Next::Again,
                ["again", "rewarm", "reload", "swap(2)", "stop(stuck)"],
            ),
            (
                Next::Retry(Retry::Registering),
                ["again", "rewarm", "reload", "swap(2)", "stop(stuck)"],
            ),
            (
                Next::Retry(Retry::Publishing),
                ["again", "rewarm", "reload", "swap(2)", "stop(stuck)"],
            ),
            (
                Next::Rewarm,
                ["rewarm", "rewarm", "reload", "swap(2)", "stop(stuck)"],
            ),
            (
                Next::Reload,
                ["reload", "reload", "reload", "swap(2)", "stop(stuck)"],
            ),
            (
                Next::Swap(1),
                ["swap(1)", "swap(1)", "reload", "swap(2)", "stop(stuck)"],
            ),
            (Next::Stop(Stop::Drained), ["stop(drained)"; 5]),
        ];
        for (then, expected) in table {
            let merged = asked.map(|asked| words(&merge(then, asked)));
            assert_eq!(merged, expected, "{then:?}");
        }
        // No request leads to a back-off; if one did, it would change nothing that is due.
        for then in [
            Next::Rewarm,
            Next::Reload,
            Next::Swap(1),
            Next::Stop(Stop::Drained),
        ] {
            assert_eq!(merge(then, Next::Retry(Retry::Registering)), then);
        }
    }

    #[test]
    fn the_model_that_follows_each_step() {
        let (absent, unproven, warm) = (Model::Absent, Model::Unproven("s"), Model::Warm("s"));
        let models = [absent.clone(), unproven.clone(), warm.clone()];
        let kept = models.clone().map(Ok);
        let expected = [
            kept.clone(),
            kept.clone(),
            kept.clone(),
            [Ok(absent.clone()), Ok(unproven.clone()), Ok(unproven)],
            [Ok(absent.clone()), Ok(absent.clone()), Ok(absent)],
            kept,
            [Err(Stop::Drained), Err(Stop::Drained), Err(Stop::Drained)],
        ];
        for (next, expected) in FROM_SERVING.into_iter().zip(expected) {
            let models = models.clone().map(|model| model.followed_by(next));
            assert_eq!(models, expected, "{next:?}");
        }
    }

    #[test]
    fn what_keeps_a_warm_worker_from_taking_jobs() {
        let (paused, broker) = (Some(Detail::Paused), Some(Detail::BrokerDisconnected));
        let taken = Some(Detail::DuplicateId);
        // By claim: not linked, linked, and both again while paused.
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
