//! The broker's greeting: the frame in which it names its version. lapin reads the frame and keeps nothing
//! of it, so the stream that lapin reads from is overheard until the frame is complete.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::Stream;
use futures_util::io::{AsyncRead, AsyncWrite};
use lapin::protocol::{AMQPClass, connection, parse_class};
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, OwnedTLSConfig};
use lapin::types::AMQPValue;
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};

/// A frame begins with its type, its channel and the length of its content.
const HEADER: usize = 7;
/// RabbitMQ's greeting is about 500 bytes long. Of a longer one nothing is kept.
const MOST: usize = 64 * 1024;

type Inner = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// Connects; returns the broker's version too, unless it names none.
pub(super) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
    tls: OwnedTLSConfig,
) -> lapin::Result<(Connection, Option<String>)> {
    let greeting = Greeting::default();
    let overheard = greeting.clone();
    let open = async move |uri: AMQPUri, _| {
        let runtime = Runtime::tokio_current();
        let inner = uri.connect_with_config_async(tls.as_ref(), &runtime);
        Ok(AsyncTcpStream::Plain(Overheard {
            inner: inner.await?,
            greeting: Some(overheard.clone()),
        }))
    };
    let parts = RuntimeParts::new(Tokio::current(), Overhearing(Tokio::current()));
    let connection = Connection::connector(uri, Runtime::new(parts), open, properties).await?;
    Ok((connection, greeting.version()))
}

/// What was read of the greeting so far.
#[derive(Debug, Clone, Default)]
struct Greeting(Arc<Mutex<Vec<u8>>>);

impl Greeting {
    /// Takes more of it; true = there is no more to come.
    fn hear(&self, bytes: &[u8]) -> bool {
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.extend_from_slice(bytes);
        let complete = content(&heard).is_some();
        if !complete && heard.len() > MOST {
            heard.clear();
            return true;
        }
        complete
    }

    fn version(&self) -> Option<String> {
        let heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, class) = parse_class(content(&heard)?).ok()?;
        let AMQPClass::Connection(connection::AMQPMethod::Start(start)) = class else {
            return None;
        };
        match start.server_properties.inner().get("version") {
            Some(AMQPValue::LongString(version)) => Some(version.to_string()),
            Some(_) | None => None,
        }
    }
}

/// The content of the first frame, once all of it is there.
fn content(heard: &[u8]) -> Option<&[u8]> {
    let length = heard.get(3..HEADER)?.try_into().ok()?;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    heard.get(HEADER..)?.get(..length)
}

/// A connected stream, TLS included. The greeting is dropped when it is complete.
struct Overheard {
    inner: Inner,
    greeting: Option<Greeting>,
}

impl AsyncRead for Overheard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = Pin::new(&mut self.inner).poll_read(context, buffer);
        if let (Poll::Ready(Ok(length)), Some(greeting)) = (&read, &self.greeting)
            && greeting.hear(buffer.get(..*length).unwrap_or_default())
        {
            self.greeting = None;
        }
        read
    }
}

impl AsyncWrite for Overheard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(context)
    }
}

/// Tokio, except that its connections are overheard: lapin wants to know which streams a runtime makes.
#[derive(Debug, Clone)]
struct Overhearing(Tokio);

impl Reactor for Overhearing {
    type TcpStream = Overheard;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// lapin has no sockets of its own to register.
    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Overheard, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move {
            Ok(Overheard {
                inner: AsyncTcpStream::Plain(connecting.await?),
                greeting: None,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A greeting whose only property is this one.
    fn greeting(property: &str, value: &str) -> Vec<u8> {
        let text = |text: &str| {
            let length = u32::try_from(text.len()).unwrap().to_be_bytes();
            [&length, text.as_bytes()].concat()
        };
        let name = [
            &[u8::try_from(property.len()).unwrap()],
            property.as_bytes(),
        ]
        .concat();
        let table = [name, b"S".to_vec(), text(value)].concat();
        let size = u32::try_from(table.len()).unwrap().to_be_bytes();
        let start = [&[0, 10, 0, 10, 0, 9][..], &size, &table];
        let content = [start.concat(), text("PLAIN AMQPLAIN"), text("en_US")].concat();
        let length = u32::try_from(content.len()).unwrap().to_be_bytes();
        [&[1, 0, 0][..], &length, &content, &[0xce]].concat()
    }

    #[test]
    fn the_version_is_read_whatever_pieces_the_greeting_comes_in() {
        for (property, expected) in [("version", Some("4.3.6")), ("product", None)] {
            let whole = greeting(property, "4.3.6");
            for size in [1, 7, 11, whole.len()] {
                let heard = Greeting::default();
                let last = whole.chunks(size).position(|piece| heard.hear(piece));
                // The mark after the content may come later.
                let until = last.map(|last| (last + 1) * size);
                assert!(until.is_some_and(|n| n + 1 >= whole.len()), "{until:?}");
                assert_eq!(heard.version().as_deref(), expected, "pieces of {size}");
            }
        }
    }

    #[test]
    fn what_is_no_greeting_names_no_version_and_takes_no_memory() {
        let heard = Greeting::default();
        assert!(!heard.hear(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
        assert_eq!(heard.version(), None);
        assert!(heard.hear(&[0xff; MOST]));
        assert_eq!(heard.0.lock().unwrap().len(), 0);
        let other = Greeting::default();
        assert!(other.hear(&[1, 0, 0, 0, 0, 0, 1, 9]));
        assert_eq!(other.version(), None);
    }
}
