//! One run of a test, timed, whose panic is a failure.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

const STEP: Duration = Duration::from_millis(100);

/// A standstill of the host that is worth a word.
const WORTH_TELLING: Duration = Duration::from_secs(2);

/// Runs `test` and says how long it took. Where its panic comes from is told by the panic itself, on standard error.
///
/// # Errors
/// It panicked: its message.
pub fn attempt(test: impl FnOnce()) -> Result<(), Failed> {
    let (begin, watch) = (Instant::now(), Watch::start());
    let outcome = catch_unwind(AssertUnwindSafe(test));
    println!("    {:.1} s", begin.elapsed().as_secs_f32());
    let standstill = watch.end();
    if standstill > WORTH_TELLING {
        println!("    the host stood still for {:.1} s of them", standstill.as_secs_f32());
    }
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        Failed::from(text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panicked").to_string())
    })
}

/// Whether the host stood still: an emulated one does when the machine below it does, and then all time limits of a test
/// have passed at once. It says where not to look for the cause of a failure.
struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<Duration>,
}

impl Watch {
    fn start() -> Self {
        let (stop, stopped) = channel();
        Self { stop, thread: thread::spawn(move || longest(&stopped)) }
    }

    /// The longest time in which this process could not do a thing.
    fn end(self) -> Duration {
        drop(self.stop);
        self.thread.join().expect("the watch")
    }
}

fn longest(stopped: &Receiver<()>) -> Duration {
    let mut longest = Duration::ZERO;
    loop {
        let before = Instant::now();
        if stopped.recv_timeout(STEP) != Err(RecvTimeoutError::Timeout) {
            return longest;
        }
        longest = longest.max(before.elapsed().saturating_sub(STEP));
    }
}
