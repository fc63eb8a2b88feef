//! `scorer dashboard`: where the page is served, and who may see it.

use std::net::SocketAddr;

use clap::Args;
use tokio::net::TcpListener;
use uuid::Uuid;

use super::{Exit, Fault, Outcome, answer, status};
use crate::config::Config;
use crate::fleet::dashboard::{Access, Fleet, SIZES, serve};

#[derive(Debug, Args)]
pub(super) struct DashboardArgs {
    /// Address and port. Beyond the loopback address, a browser needs the token in the printed address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8088")]
    listen: SocketAddr,
    /// Show who sends what: results counted by this key of the jobs' `context`, the first 1,000 values by name.
    #[arg(long, value_name = "KEY")]
    contributors: Option<String>,
    /// Show a simulated fleet of so many workers instead: 3, 100 or 1000. Needs neither RabbitMQ nor Redis. `--contributors
    /// miner_id` works with it.
    #[arg(long, value_name = "WORKERS", num_args = 0..=1, default_missing_value = "100", value_parser = demo_size)]
    demo: Option<usize>,
}

fn demo_size(text: &str) -> Result<usize, String> {
    let size = text.parse().ok().filter(|size| SIZES.contains(size));
    size.ok_or_else(|| format!("there are fleets of {SIZES:?}"))
}

pub(super) async fn dashboard(config: Config, args: DashboardArgs) -> Outcome {
    let fleet = match args.demo {
        Some(workers) => Fleet::Demo { workers },
        None => Fleet::Live {
            model: status::known_model(&config)?,
            config: Box::new(config),
        },
    };
    let listening = async {
        let listener = TcpListener::bind(args.listen).await?;
        let address = listener.local_addr()?;
        Ok::<_, std::io::Error>((listener, address))
    };
    let (listener, address) = listening.await.map_err(|e| {
        let text = format!("--listen {}: {e}", args.listen);
        Fault::unavailable(text)
    })?;
    let (access, path) = match address.ip().is_loopback() {
        true => (Access::Loopback, String::new()),
        false => {
            let token = Uuid::new_v4().simple().to_string();
            let path = format!("?token={token}");
            (Access::Token(token), path)
        }
    };
    answer(&format!("http://{address}/{path}"))?;
    tokio::select! {
        () = serve(fleet, args.contributors, listener, access) => Ok(Exit::Done),
        _ = tokio::signal::ctrl_c() => Ok(Exit::Done),
    }
}
