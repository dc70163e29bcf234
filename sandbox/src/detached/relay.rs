//! The owner's side of the streams of a detached container: output goes to its log and to all who look on, and its input is
//! what any of them sends.
//!
//! Who looks on and reads gets every byte, and the container waits for him. Who has not taken anything for
//! [`PATIENCE`] is not waited for any longer: output is left out for him, until he has taken what was queued before.

use std::collections::VecDeque;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use krx_proto::{encode, read_frame, write_frame};

use super::OutputStream;
use super::log::LogWriter;
use super::wire::{Hello, MAX_OUTPUT, Notice, VERSION, Welcome};

/// How long the container is held up by one who looks on and does not read.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// What is queued for each of them, beyond what his socket takes.
const MAX_QUEUED: usize = 256 << 10;
/// Each has two threads and a queue.
const MAX_LOOKERS: usize = 32;
/// For the first word of one who has connected.
const HELLO: Duration = Duration::from_secs(5);

/// Where the output of a container goes, and its input comes from.
#[derive(Debug)]
pub struct Relay {
    log: Mutex<LogWriter>,
    lookers: Mutex<Vec<Arc<Looker>>>,
    terminal: bool,
    input: Option<PipeWriter>,
}

/// One of those who look on.
#[derive(Debug)]
struct Looker {
    queue: Mutex<Queue>,
    changed: Condvar,
    output: bool,
}

#[derive(Debug, Default)]
struct Queue {
    notices: VecDeque<Arc<[u8]>>,
    bytes: usize,
    /// When the last notice was taken, or the first one queued: it tells who reads.
    moved: Option<Instant>,
    /// Is not waited for, until all of the queue is taken.
    lags: bool,
    /// Bytes left out since.
    missed: u64,
    gone: bool,
}

impl Relay {
    /// Listens at `socket`. Also returned is what feeds the container's input, where it has one. It has no end: those who
    /// look on come and go.
    ///
    /// # Errors
    /// The socket cannot be made, or the thread.
    pub fn listen(
        socket: &Path,
        log: LogWriter,
        terminal: bool,
        input: bool,
    ) -> io::Result<(Arc<Self>, Option<PipeReader>)> {
        let listener = UnixListener::bind(socket)?;
        let (reader, writer) = input.then(io::pipe).transpose()?.unzip();
        let (log, lookers) = (Mutex::new(log), Mutex::default());
        let relay = Arc::new(Self { log, lookers, terminal, input: writer });
        let serving = relay.clone();
        thread::Builder::new().name("lookers".into()).spawn(move || serving.serve(&listener))?;
        Ok((relay, reader))
    }

    /// What takes the output of a stream.
    #[must_use]
    pub fn output(self: &Arc<Self>, stream: OutputStream) -> Box<dyn Write + Send> {
        Box::new(Sink { relay: self.clone(), stream })
    }

    /// Tells the end to all who look on, and gives those who read time to take what is queued.
    pub fn end(&self, code: u8) {
        let lookers = self.lookers().clone();
        for looker in &lookers {
            looker.end(code);
        }
        for looker in lookers {
            looker.flush();
        }
    }

    fn lookers(&self) -> MutexGuard<'_, Vec<Arc<Looker>>> {
        self.lookers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, stream: OutputStream, bytes: &[u8]) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.log.lock().unwrap_or_else(PoisonError::into_inner).append(stream, bytes, now);
        // Not under the lock: who does not read must not keep others from coming and going.
        let lookers = self.lookers().clone();
        if lookers.is_empty() {
            return;
        }
        for piece in bytes.chunks(MAX_OUTPUT) {
            let notice = Notice::Output { stream, length: u32::try_from(piece.len()).unwrap_or_default() };
            let Ok(header) = encode(&notice) else { return };
            let notice: Arc<[u8]> = [&header, piece].concat().into();
            lookers
                .iter()
                .filter(|looker| looker.output)
                .for_each(|looker| looker.push(&notice, piece.len()));
        }
    }

    fn serve(self: &Arc<Self>, listener: &UnixListener) {
        for socket in listener.incoming().flatten() {
            let relay = self.clone();
            // One that cannot be served is told so by the end of its connection.
            let _ = thread::Builder::new().name("looker".into()).spawn(move || relay.attend(&socket));
        }
    }

    fn attend(&self, socket: &UnixStream) {
        let Some(looker) = self.welcome(socket) else { return };
        let Ok(theirs) = socket.try_clone() else { return };
        let served = looker.clone();
        let sender = thread::Builder::new().name("looker-out".into()).spawn(move || served.send(theirs));
        if sender.is_ok() {
            self.take_input(socket);
        }
        looker.leave();
        self.lookers().retain(|other| !Arc::ptr_eq(other, &looker));
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }

    fn welcome(&self, mut socket: &UnixStream) -> Option<Arc<Looker>> {
        socket.set_read_timeout(Some(HELLO)).ok()?;
        socket.set_write_timeout(Some(HELLO)).ok()?;
        let hello: Hello = read_frame(&mut socket).ok()?;
        let (queue, changed) = (Mutex::default(), Condvar::new());
        let looker = Arc::new(Looker { queue, changed, output: hello.output });
        let full = {
            let mut lookers = self.lookers();
            let full = lookers.len() >= MAX_LOOKERS;
            if !full && hello.version == VERSION {
                lookers.push(looker.clone());
            }
            full
        };
        let (terminal, input) = (self.terminal, self.input.is_some());
        let welcome = Welcome { version: VERSION, terminal, input, full };
        let told = write_frame(&mut socket, &welcome).is_ok();
        socket.set_read_timeout(None).ok()?;
        socket.set_write_timeout(None).ok()?;
        if !told {
            self.lookers().retain(|other| !Arc::ptr_eq(other, &looker));
        }
        (told && !full && hello.version == VERSION).then_some(looker)
    }

    /// Until the connection ends. Bytes for an input that is not there are nobody's.
    fn take_input(&self, mut socket: &UnixStream) {
        let mut buffer = [0; 4096];
        loop {
            match socket.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    if let Some(mut input) = self.input.as_ref() {
                        let _ = input.write_all(&buffer[..count]);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

/// Takes all that is written, whatever becomes of it: the process must not hear of it.
struct Sink {
    relay: Arc<Relay>,
    stream: OutputStream,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.relay.write(self.stream, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Looker {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a notice with so many bytes of output, waiting for room as long as some of it is taken.
    fn push(&self, notice: &Arc<[u8]>, length: usize) {
        let mut queue = self.lock();
        if queue.lags && queue.notices.is_empty() {
            queue.catch_up();
        }
        while !queue.gone && !queue.lags && queue.bytes + length > MAX_QUEUED {
            let left = queue.patience();
            queue.lags = left.is_zero();
            queue = self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if queue.lags {
            queue.missed += length as u64;
        } else if !queue.gone {
            queue.add(notice.clone());
            self.changed.notify_all();
        }
    }

    fn end(&self, code: u8) {
        let mut queue = self.lock();
        queue.catch_up();
        if let Ok(ended) = encode(&Notice::Ended(code)) {
            queue.add(ended.into());
        }
        self.changed.notify_all();
    }

    /// Waits until all is taken, or nothing is any more.
    fn flush(&self) {
        let mut queue = self.lock();
        // Whoever was given up before is given another chance.
        queue.moved = Some(Instant::now());
        while !queue.gone && !queue.notices.is_empty() && !queue.patience().is_zero() {
            let left = queue.patience();
            queue = self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn leave(&self) {
        self.lock().gone = true;
        self.changed.notify_all();
    }

    /// Body of the thread that writes to the connection.
    fn send(&self, mut socket: UnixStream) {
        loop {
            let notice = {
                let mut queue = self.lock();
                while !queue.gone && queue.notices.is_empty() {
                    queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                match queue.notices.front() {
                    Some(notice) if !queue.gone => notice.clone(),
                    _ => return,
                }
            };
            let written = socket.write_all(&notice);
            let mut queue = self.lock();
            // Only now, so that an empty queue means that all is written.
            queue.notices.pop_front();
            queue.bytes -= notice.len();
            queue.moved = Some(Instant::now());
            queue.gone |= written.is_err();
            self.changed.notify_all();
        }
    }
}

impl Queue {
    /// How long its reader is waited for yet.
    fn patience(&self) -> Duration {
        PATIENCE.saturating_sub(self.moved.map_or(Duration::ZERO, |moved| moved.elapsed()))
    }

    fn add(&mut self, notice: Arc<[u8]>) {
        if self.notices.is_empty() {
            self.moved = Some(Instant::now());
        }
        self.bytes += notice.len();
        self.notices.push_back(notice);
    }

    /// Says what was left out; from here on nothing is.
    fn catch_up(&mut self) {
        self.lags = false;
        let missed = std::mem::take(&mut self.missed);
        if missed > 0
            && let Ok(notice) = encode(&Notice::Missed(missed))
        {
            self.add(notice.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detached::attachment::{AttachError, Attachment, Event};
    use crate::testing::Scratch;
    use std::path::PathBuf;

    struct Stage {
        scratch: Scratch,
        relay: Arc<Relay>,
        input: Option<PipeReader>,
    }

    impl Stage {
        fn new(input: bool) -> Self {
            let scratch = Scratch::new("relay");
            let log = LogWriter::create(scratch.path()).unwrap();
            let (relay, input) = Relay::listen(&scratch.path().join("attach"), log, false, input).unwrap();
            Self { scratch, relay, input }
        }

        fn socket(&self) -> PathBuf {
            self.scratch.path().join("attach")
        }

        fn attach(&self) -> Attachment {
            Attachment::open(&self.socket(), true).unwrap()
        }
    }

    fn all(mut attachment: Attachment) -> (Vec<u8>, u64, u8) {
        let (mut bytes, mut missed) = (Vec::new(), 0);
        loop {
            match attachment.next_event().unwrap() {
                Event::Output(_, more) => bytes.extend(more),
                Event::Missed(more) => missed += more,
                Event::Ended(code) => return (bytes, missed, code),
            }
        }
    }

    #[test]
    fn all_who_look_on_see_the_same() {
        let stage = Stage::new(false);
        let mut lookers = [stage.attach(), stage.attach()];
        stage.relay.output(OutputStream::Stdout).write_all(b"out").unwrap();
        stage.relay.output(OutputStream::Stderr).write_all(b"err").unwrap();
        for looker in &mut lookers {
            for (stream, bytes) in [(OutputStream::Stdout, b"out"), (OutputStream::Stderr, b"err")] {
                match looker.next_event().unwrap() {
                    Event::Output(from, got) => assert_eq!((from, &got[..]), (stream, &bytes[..])),
                    other => panic!("{other:?}"),
                }
            }
        }
        let silent = Attachment::open(&stage.socket(), false).unwrap();
        stage.relay.output(OutputStream::Stdout).write_all(&[7; 200_000]).unwrap();
        stage.relay.end(3);
        for looker in lookers {
            assert_eq!(all(looker), (vec![7; 200_000], 0, 3));
        }
        assert_eq!(all(silent), (Vec::new(), 0, 3));
        let log = std::fs::metadata(stage.scratch.path().join("log")).unwrap();
        assert!(log.len() > 200_000);
    }

    #[test]
    fn input_is_everybodys() {
        let stage = Stage::new(true);
        let mut input = stage.input.as_ref().unwrap();
        for word in [b"one", b"two"] {
            let attachment = stage.attach();
            assert!(attachment.input && !attachment.terminal);
            attachment.input().unwrap().write_all(word).unwrap();
            let mut got = [0; 3];
            input.read_exact(&mut got).unwrap();
            assert_eq!(&got, word);
        }
        assert!(!Stage::new(false).attach().input);
    }

    #[test]
    fn who_does_not_read_is_let_go_of_and_told() {
        const CHUNK: usize = 60_000;
        let stage = Stage::new(false);
        let (slow, quick) = (stage.attach(), stage.attach());
        let reading = thread::spawn(move || all(quick));
        let begin = Instant::now();
        let mut output = stage.relay.output(OutputStream::Stdout);
        for _ in 0..100 {
            output.write_all(&[1; CHUNK]).unwrap();
        }
        let took = begin.elapsed();
        assert!(took >= PATIENCE && took < 4 * PATIENCE, "{took:?}");
        let reading_slowly = thread::spawn(move || all(slow));
        // It reads again, and from some time on misses nothing.
        let caught_up = |relay: &Relay| relay.lookers().iter().all(|looker| looker.lock().notices.is_empty());
        while !caught_up(&stage.relay) {
            thread::sleep(Duration::from_millis(5));
        }
        output.write_all(b"again").unwrap();
        stage.relay.end(0);
        let (bytes, missed, code) = reading_slowly.join().unwrap();
        assert_eq!((bytes.len() + usize::try_from(missed).unwrap(), code), (100 * CHUNK + 5, 0));
        assert!(missed > 0 && bytes.ends_with(b"again"));
        assert_eq!(reading.join().unwrap(), ([vec![1; 100 * CHUNK], b"again".to_vec()].concat(), 0, 0));
    }

    #[test]
    fn those_who_leave_make_room() {
        let stage = Stage::new(false);
        let held: Vec<_> = (0..MAX_LOOKERS).map(|_| stage.attach()).collect();
        assert!(matches!(Attachment::open(&stage.socket(), true), Err(AttachError::Full)));
        drop(held);
        let begin = Instant::now();
        while Attachment::open(&stage.socket(), true).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(10));
        }
    }

    #[test]
    fn another_version_is_told_so_and_junk_is_nobody() {
        let stage = Stage::new(false);
        let mut socket = UnixStream::connect(stage.socket()).unwrap();
        write_frame(&mut socket, &Hello { version: VERSION + 1, output: true }).unwrap();
        let welcome: Welcome = read_frame(&mut socket).unwrap();
        assert_eq!(welcome.version, VERSION);
        assert_eq!(socket.read(&mut [0]).unwrap(), 0);
        let mut socket = UnixStream::connect(stage.socket()).unwrap();
        socket.write_all(&[0xff; 64]).unwrap();
        let _ = socket.read(&mut [0]);
        assert!(stage.relay.lookers().is_empty());
    }
}
