//! `scorer dashboard`: where the page is served, and to whom.

use std::net::SocketAddr;

use clap::Args;
use tokio::net::TcpListener;
use uuid::Uuid;

use super::{Exit, Fault, Outcome, answer, status};
use crate::config::Config;
use crate::fleet::dashboard::{Door, serve};

#[derive(Debug, Args)]
pub(super) struct DashboardArgs {
    /// Address and port. Not on the loopback address, the page is shown to who has the token that the
    /// printed address carries.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8088")]
    listen: SocketAddr,
}

pub(super) async fn dashboard(config: Config, args: DashboardArgs) -> Outcome {
    let model = status::known_model(&config)?;
    let listening = async {
        let listener = TcpListener::bind(args.listen).await?;
        let address = listener.local_addr()?;
        Ok::<_, std::io::Error>((listener, address))
    };
    let (listener, address) = listening.await.map_err(|e| {
        let text = format!("--listen {}: {e}", args.listen);
        Fault::new(Exit::Unavailable, text)
    })?;
    let (door, path) = match address.ip().is_loopback() {
        true => (Door::Loopback, String::new()),
        false => {
            let token = Uuid::new_v4().simple().to_string();
            let path = format!("?token={token}");
            (Door::Token(token), path)
        }
    };
    answer(&format!("http://{address}/{path}"))?;
    tokio::select! {
        () = serve(config, model, listener, door) => Ok(Exit::Done),
        _ = tokio::signal::ctrl_c() => Ok(Exit::Done),
    }
}
