//! What the board is told of a real fleet: records and events from Redis, queue depths, and copies of
//! results and dead-lettered jobs. Nothing is settled.

use std::sync::Arc;

use super::App;
use super::news::ParkedJob;
use super::text::{MESSAGE, NAME, cut};
use super::verdict::SeenResult;
use crate::broker::amqp::{Deliveries, Delivery, Link};
use crate::broker::nodes::Nodes;
use crate::broker::topology::Topology;
use crate::broker::{BrokerError, Properties};
use crate::config::Config;
use crate::fleet::observer::Observer;
use crate::protocol::result::ResultMessage;
use crate::util::backoff::Backoff;

/// Looks at the fleet every second.
pub(super) async fn look(config: Config, model: Option<String>, app: Arc<App>) {
    let mut observer = Observer::new(&config, model);
    let mut ticks = super::ticks();
    loop {
        ticks.tick().await;
        let looked = observer.look().await;
        let last = app.board().last_event();
        // Events missed now are read at the next look.
        let events = observer.events(last.as_deref()).await.unwrap_or_default();
        match looked {
            Ok(view) => app.board().see(&view, events),
            Err(error) => app.board().lose_sight(error.to_string()),
        }
        app.publish();
    }
}

/// Reads copies of results and dead-lettered jobs while there is a connection to RabbitMQ.
pub(super) async fn watch_results(config: Config, app: Arc<App>) {
    let mut nodes = Nodes::new(&config.amqp);
    let mut backoff = Backoff::new();
    loop {
        let model = config.model.name.clone().or_else(|| app.board().model());
        let Some(model) = model else {
            let why = "no worker has been seen, so the model is unknown; set model.name";
            app.board().watches(Err(why.to_owned()));
            tokio::time::sleep(super::EVERY).await;
            continue;
        };
        let topology = Topology::new(&config.amqp, &model);
        match subscribe(&mut nodes, &topology).await {
            Ok(watching) => {
                backoff.reset();
                let now_ms = app.board().now_ms();
                app.board().watches(Ok(now_ms));
                watching.follow(&app).await;
                let why = "the connection to RabbitMQ is lost".to_owned();
                app.board().watches(Err(why));
            }
            Err(error) => app.board().watches(Err(error.to_string())),
        }
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

/// Exclusive queues: nothing is kept for the dashboard while it is not connected.
struct Watching {
    link: Link,
    results: Deliveries,
    parked: Deliveries,
}

async fn subscribe(nodes: &mut Nodes, topology: &Topology) -> Result<Watching, BrokerError> {
    let link = Link::connect(nodes, "scorer-dashboard").await?;
    let all = format!("{}.*", topology.model);
    let (_, results) = link.subscribe(&topology.results_exchange(), &[all]).await?;
    let (dead, model) = (topology.dead_exchange(), topology.model.clone());
    let (_, parked) = link.subscribe(&dead, &[model]).await?;
    Ok(Watching {
        link,
        results,
        parked,
    })
}

impl Watching {
    async fn follow(mut self, app: &App) {
        loop {
            tokio::select! {
                Some(delivery) = self.results.next() => {
                    let at_ms = app.board().now_ms();
                    if let Some(seen) = seen(&delivery, at_ms) {
                        app.board().judge(&seen);
                    }
                }
                Some(delivery) = self.parked.next() => {
                    let at_ms = app.board().now_ms();
                    app.board().park(parked(&delivery, at_ms));
                }
                () = self.link.lost.cancelled() => return,
                else => return self.link.close().await,
            }
        }
    }
}

/// None: it is no result.
fn seen(delivery: &Delivery, at_ms: u64) -> Option<SeenResult> {
    let properties = &delivery.properties;
    let mut result = ResultMessage::decode(&delivery.body, properties.label()).ok()?;
    result.submission_id = cut(&result.submission_id, NAME).to_owned();
    // SUBMISSION_ID:MODEL_VERSION:STATUS:KEY, and the first part may have colons, too.
    let key = properties.message_id.as_ref()?.rsplit_once(':');
    let key = key.map(|(_, key)| key.to_owned());
    Some(SeenResult {
        at_ms,
        result,
        key: key.filter(|key| !key.is_empty()),
        trace_id: trace_id(properties),
    })
}

fn parked(delivery: &Delivery, at_ms: u64) -> ParkedJob {
    let properties = &delivery.properties;
    let id = properties
        .correlation_id
        .clone()
        .or_else(|| properties.message_id.clone());
    let text = |text: Option<String>, most| cut(&text.unwrap_or_default(), most).to_owned();
    ParkedJob {
        submission_id: text(id, NAME),
        code: text(properties.dead_letter_reason(), NAME),
        message: text(properties.dead_letter_message(), MESSAGE),
        worker: text(properties.dead_lettered_by(), NAME),
        at_ms,
        trace_id: trace_id(properties),
    }
}

/// The second part of `traceparent`: VERSION-TRACE-SPAN-FLAGS.
fn trace_id(properties: &Properties) -> Option<String> {
    let parent = properties.header("traceparent")?;
    let trace_id = parent.split('-').nth(1)?;
    Some(cut(trace_id, NAME).to_owned())
}
