//! Streams of exec, attach and port-forward: WebSocket messages whose first byte is the number of a channel
//! (`v4.channel.k8s.io`), as the API server's clients use them.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use tungstenite::client::IntoClientRequest;
use tungstenite::{Error, Message, WebSocket};

use crate::pod::patience;

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
/// At the end: how the command ended, as a Kubernetes `Status`.
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// Of a forwarded port; each starts with two bytes, the port.
const DATA: u8 = 0;
const FAILURE: u8 = 1;
const PORT_BYTES: usize = 2;

const PROTOCOL: &str = "v4.channel.k8s.io";
/// Longest a stream may be silent while a test waits.
const ANSWER: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Stream {
    socket: WebSocket<TcpStream>,
    received: [Vec<u8>; 5],
    closed: bool,
}

impl Stream {
    /// # Panics
    /// When the streaming server does not take it.
    #[must_use]
    pub fn open(url: &str) -> Self {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.as_str().into_client_request().expect("URL of a stream");
        let address = request.uri().authority().expect("address").to_string();
        request.headers_mut().insert("Sec-WebSocket-Protocol", PROTOCOL.parse().expect("header"));
        let tcp = TcpStream::connect(address).expect("streaming server");
        tcp.set_read_timeout(Some(patience(ANSWER))).expect("timeout");
        let (socket, _) = tungstenite::client(request, tcp).expect("WebSocket");
        Self { socket, received: Default::default(), closed: false }
    }

    fn write(&mut self, channel: u8, bytes: &[u8]) {
        self.socket.send(Message::binary([&[channel], bytes].concat())).expect("send");
    }

    /// To the command's standard input, or the forwarded port.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.write(STDIN, bytes.as_ref());
    }

    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.write(RESIZE, format!(r#"{{"Width":{columns},"Height":{rows}}}"#).as_bytes());
    }

    /// One message more; false at the end.
    fn receive(&mut self) -> bool {
        match self.socket.read() {
            Ok(message) if message.is_close() => self.closed = true,
            Ok(message) => {
                if let [channel, bytes @ ..] = &message.into_data()[..]
                    && let Some(received) = self.received.get_mut(usize::from(*channel))
                {
                    received.extend_from_slice(bytes);
                }
            }
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("no answer within {ANSWER:?}: {self:?}")
            }
            Err(_) => self.closed = true,
        }
        !self.closed
    }

    /// What came on a channel until now.
    #[must_use]
    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(&self.received[usize::from(channel)]).into_owned()
    }

    /// Waits until `text` came on a channel.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_for(&mut self, channel: u8, text: &str) {
        let begin = Instant::now();
        while !self.text(channel).contains(text) {
            assert!(self.receive() && begin.elapsed() < patience(ANSWER), "no {text:?} in {:?}", self.all());
        }
    }

    /// Waits for the command's end.
    ///
    /// # Panics
    /// When it does not end, or not as a command does.
    pub fn exit_code(&mut self) -> i32 {
        while self.received[usize::from(STATUS)].is_empty() && self.receive() {}
        let status: serde_json::Value = serde_json::from_str(&self.text(STATUS))
            .unwrap_or_else(|_| panic!("no status: {:?}", self.all()));
        if status["status"] == "Success" {
            return 0;
        }
        let code = status["details"]["causes"][0]["message"].as_str();
        code.and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no exit code: {status}"))
    }

    /// Waits for a number of bytes from a forwarded port.
    ///
    /// # Panics
    /// When they do not come.
    pub fn forwarded(&mut self, length: usize) -> Vec<u8> {
        while self.received[usize::from(DATA)].len() < length + PORT_BYTES {
            assert!(self.receive(), "the forwarded port ended: {:?}", self.all());
        }
        self.received[usize::from(DATA)][PORT_BYTES..].to_vec()
    }

    /// Why a port was not forwarded.
    pub fn failure(&mut self) -> String {
        while self.received[usize::from(FAILURE)].len() <= PORT_BYTES && self.receive() {}
        String::from_utf8_lossy(self.received[usize::from(FAILURE)].get(PORT_BYTES..).unwrap_or_default())
            .into()
    }

    fn all(&self) -> Vec<String> {
        (0..5).map(|channel| self.text(channel)).collect()
    }
}
