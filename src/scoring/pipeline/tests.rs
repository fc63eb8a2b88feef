use super::*;
use crate::engine::tests::{configuration, hazard};
use crate::model::package::Package;
use crate::protocol::job::{Format, Member, Rule};
use crate::protocol::merge::OnRejected;
use crate::scoring::members::tests::candidate;
use crate::telemetry::progress::Progress;

fn job(task: Task) -> Job {
    Job {
        submission_id: "job".into(),
        model: None,
        task,
        validation: Validation::default(),
        deadline_ms: None,
        context: None,
    }
}

fn member(id: &str, source: Source) -> Member {
    let url = matches!(source, Source::Url(_));
    Member {
        id: id.into(),
        weight: 0.5,
        candidate: Candidate {
            format: Format::BinaryV2,
            compression: None,
            rule: Rule::ParamDiff,
            source,
            sha256: url.then_some([0; 32]),
            size: url.then_some(1),
        },
    }
}

fn merge(package: &Package, members: Vec<Member>) -> Task {
    Task::Merge {
        model_version: package.manifest.version,
        members,
        on_rejected: OnRejected::Drop,
    }
}

/// Of three members that differ: seven passes.
fn merge_of_three(package: &Package) -> Task {
    let inline = |entries| Source::Inline(candidate(package, entries));
    let members = [("a", 1), ("b", 2), ("c", 3)];
    let members = members.map(|(id, entries)| member(id, inline(entries)));
    merge(package, members.into())
}

async fn judged(pipeline: &Pipeline, task: Task) -> Verdict {
    let job = job(task);
    let job_ref = JobRef::new(&job, 1);
    let judged = pipeline.judge(&job, &job_ref, &Trace::silent()).await;
    let Judged::Fresh { verdict, .. } = judged else {
        panic!("{judged:?}");
    };
    verdict
}

/// Each fetch has its own time limit; sixteen of them, one after the other, would let the broker's pass.
#[tokio::test]
async fn members_are_fetched_within_a_quarter_of_the_consumer_timeout() {
    let (package, _folder) = hazard();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", silent.local_addr().unwrap());
    let mut config = configuration();
    config.candidates.allow = vec![url.clone()];
    config.candidates.allow_private = true;
    config.amqp.consumer_timeout = Duration::from_secs(4);
    config.amqp.retry_delays = Vec::new();
    let read = Arc::clone(&package);
    let engine = EngineHandle::start(move || Ok(read), &config, Arc::default());
    let fetcher = Fetcher::new(config.candidates.clone(), None).unwrap();
    let pipeline = Pipeline::new(engine.await.unwrap(), &config, fetcher, "test", None);
    let away = |id: &str| member(id, Source::Url(url.clone() + id));
    let near = member("near", Source::Inline(candidate(&package, 1)));
    let mut members: Vec<Member> = ["a", "b", "c", "d", "e", "f"].map(away).into();
    members.push(near);
    let Ok(Body::Merge(body)) = judged(&pipeline, merge(&package, members)).await else {
        panic!("one is left")
    };
    for member in &body.members[..6] {
        let error = member.error.as_ref().unwrap();
        assert_eq!(error.code, Code::CandidateUnavailable);
        assert!(
            error.message.contains("a quarter of amqp.consumer_timeout"),
            "{error:?}"
        );
    }
    assert!(body.members[6].contribution.is_some());
}

#[tokio::test]
async fn a_job_that_would_outlast_half_of_the_consumer_timeout_is_not_computed() {
    let (package, _folder) = hazard();
    let (config, progress) = (configuration(), Arc::new(Progress::default()));
    let read = Arc::clone(&package);
    let engine = EngineHandle::start(move || Ok(read), &config, Arc::clone(&progress));
    let engine = engine.await.unwrap();
    let fetcher = Fetcher::new(config.candidates.clone(), config.candidates_dir());
    let queue = DeviceQueue::default();
    let pipeline = Pipeline::new(engine, &config, fetcher.unwrap(), "test", None).with_shared(
        RecentResults::default(),
        queue.clone(),
        Arc::default(),
    );
    let verdict = async |task: Task, per_window| {
        queue.set_pace(per_window);
        judged(&pipeline, task).await
    };
    let validate = || Task::Validate {
        model_version: None,
    };
    let limit = config.amqp.consumer_timeout / 2;
    let windows = pipeline.plan(&Validation::default()).await.unwrap();
    let windows = u32::try_from(windows.windows.len()).unwrap();
    let refused = async |task: Task, per_window| {
        let failure = verdict(task, per_window).await.unwrap_err();
        assert_eq!(failure.code, Code::ScoreTimeout, "{failure}");
        let number = |name: &str| u128::from(failure.detail[name].as_u64().unwrap());
        assert_eq!(number("limit_ms"), limit.as_millis());
        number("needed_ms")
    };
    let computed = || progress.counter.load(std::sync::atomic::Ordering::Relaxed);
    assert!(refused(validate(), limit).await > limit.as_millis());
    // A quarter of the limit for a pass: one may run, and a merge of seven may not.
    let pass = limit / windows / 4;
    let needed = (pass * windows * 7).as_millis();
    assert_eq!(refused(merge_of_three(&package), pass).await, needed);
    assert_eq!(computed(), 0, "nothing was begun");
    assert!(verdict(validate(), pass).await.is_ok());
    assert_ne!(computed(), 0);
    assert!(verdict(merge_of_three(&package), pass / 2).await.is_ok());
}
