//! `scorer dashboard`: where the page is served, and who may see it.

use std::net::SocketAddr;

use clap::Args;
use tokio::net::TcpListener;
use uuid::Uuid;

use super::{Exit, Fault, Outcome, answer, status};
use crate::config::Config;
use crate::fleet::dashboard::{Access, serve};

#[derive(Debug, Args)]
pub(super) struct DashboardArgs {
    /// Address and port. Beyond the loopback address, a browser needs the token in the printed address.
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
        () = serve(config, model, listener, access) => Ok(Exit::Done),
        _ = tokio::signal::ctrl_c() => Ok(Exit::Done),
    }
}
