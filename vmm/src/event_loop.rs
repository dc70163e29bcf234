//! The VMM's one event loop, and where device workers run: on it, or on a thread of their own.
//!
//! Everything that waits for descriptors is a subscriber of an `event_manager::EventManager` on the main thread;
//! vCPU threads add and remove device workers through its remote endpoint when a driver starts or resets a device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::jail::seccomp;
use crate::sys;
use crate::virtio::device::{Device, DeviceError, Placement, Worker};
use crate::virtio::irq::Interrupt;
use crate::virtio::mmio::{Running, WorkerHost};

/// What the loop holds.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;
/// The loop itself.
pub type EventLoop = EventManager<Subscriber>;

/// Asks the loop to end, from any thread, with the first answer given to "why?".
#[derive(Debug)]
pub struct Stop<T> {
    reason: Arc<Mutex<Option<T>>>,
    wake: Arc<EventFd>,
}

impl<T> Clone for Stop<T> {
    fn clone(&self) -> Self {
        Self { reason: Arc::clone(&self.reason), wake: Arc::clone(&self.wake) }
    }
}

impl<T: Send + 'static> Stop<T> {
    /// # Errors
    /// When the host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self { reason: Arc::new(Mutex::new(None)), wake })
    }

    /// Ends the loop; only the first reason counts.
    pub fn set(&self, reason: T) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        // Cannot fail: the counter would have to be at its maximum, and then the loop is awake.
        let _ = self.wake.write(1);
    }

    /// The reason, once there is one.
    #[must_use]
    pub fn take(&self) -> Option<T> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Has the loop woken, so that its owner looks at [`take`](Self::take).
    ///
    /// # Errors
    /// When the loop cannot watch one descriptor more.
    pub fn wake(&self, event_loop: &mut EventLoop) -> io::Result<()> {
        let wake = Arc::clone(&self.wake);
        on_readable(event_loop, self.wake.as_raw_fd(), EventSet::IN, move || drop(wake.read()))
    }
}

/// Has `action` called when `fd` is readable or hung up; with `EDGE_TRIGGERED`, once for each time it becomes so.
/// `action` owns what `fd` belongs to.
///
/// # Errors
/// When `fd` cannot be watched: it is a regular file, or the loop is out of memory.
pub fn on_readable(
    event_loop: &mut EventLoop,
    fd: RawFd,
    events: EventSet,
    action: impl FnMut() + Send + 'static,
) -> io::Result<()> {
    let subscriber = Box::new(OnReadable(action));
    subscribe(event_loop, subscriber, Events::new_raw(fd, events)).map(drop).map_err(io::Error::other)
}

struct OnReadable<F>(F);

impl<F: FnMut()> MutEventSubscriber for OnReadable<F> {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        (self.0)();
    }

    fn init(&mut self, _: &mut EventOps) {}
}

/// Adds a subscriber only together with what it waits for.
fn subscribe(
    to: &mut dyn SubscriberOps<Subscriber = Subscriber>,
    subscriber: Subscriber,
    events: Events,
) -> Result<SubscriberId, event_manager::Error> {
    let id = to.add_subscriber(subscriber);
    match to.event_ops(id).and_then(|mut ops| ops.add(events)) {
        Ok(()) => Ok(id),
        Err(error) => {
            // It was there a moment ago, and goes with what it holds.
            let _ = to.remove_subscriber(id);
            Err(error)
        }
    }
}

/// Runs device workers where their device wants them.
#[derive(Clone)]
pub struct Workers {
    endpoint: RemoteEndpoint<Subscriber>,
}

impl Workers {
    #[must_use]
    pub fn new(event_loop: &EventLoop) -> Self {
        Self { endpoint: event_loop.remote_endpoint() }
    }

    /// The host of one device's workers. A thread that it needs is started now: what starts a worker later is a vCPU,
    /// which is confined to what a vCPU does, and so would be its threads.
    ///
    /// # Errors
    /// When the host cannot give a thread.
    pub fn of_device(&self, device: &dyn Device) -> io::Result<DeviceHost> {
        let name = format!("krx-{}", device.kind().name());
        match device.placement() {
            Placement::EventLoop => Ok(DeviceHost::Loop { endpoint: self.endpoint.clone(), name }),
            Placement::OwnThread(kind) => {
                let (jobs, work) = mpsc::channel::<Job>();
                thread::Builder::new().name(name.clone()).spawn(move || {
                    seccomp::confine(kind);
                    work.into_iter().for_each(|job| job.run(&name));
                })?;
                Ok(DeviceHost::Thread(jobs))
            }
        }
    }
}

/// Where the workers of one device run, one at a time.
pub enum DeviceHost {
    Loop {
        endpoint: RemoteEndpoint<Subscriber>,
        name: String,
    },
    /// A thread, which ends when this is dropped.
    Thread(mpsc::Sender<Job>),
}

/// A worker for a thread.
pub struct Job {
    worker: Box<dyn Worker>,
    stop: EventFd,
    interrupt: Interrupt,
    /// Dropped when the worker is.
    done: mpsc::Sender<()>,
}

impl Job {
    fn run(self, name: &str) {
        let Self { worker, stop, interrupt, done } = self;
        run_on_thread(worker, &stop, &interrupt, name);
        drop(done);
    }
}

impl WorkerHost for DeviceHost {
    fn start(&self, worker: Box<dyn Worker>, interrupt: Interrupt) -> Result<Box<dyn Running>, DeviceError> {
        match self {
            Self::Loop { endpoint, name } => {
                let events = Events::new_raw(worker.fd(), EventSet::IN);
                let subscriber: Subscriber =
                    Box::new(OnLoop { worker: Some(worker), interrupt, name: name.clone() });
                let id = endpoint
                    .call_blocking(move |ops| subscribe(ops, subscriber, events))
                    .map_err(|error| DeviceError::Host(io::Error::other(error)))?;
                Ok(Box::new(LoopRunning { endpoint: endpoint.clone(), id }))
            }
            Self::Thread(jobs) => {
                let stop = EventFd::new(EFD_NONBLOCK).map_err(DeviceError::Host)?;
                let stopped = stop.try_clone().map_err(DeviceError::Host)?;
                let (done, wait) = mpsc::channel();
                jobs.send(Job { worker, stop: stopped, interrupt, done })
                    .map_err(|_| DeviceError::Host(io::ErrorKind::BrokenPipe.into()))?;
                Ok(Box::new(ThreadRunning { stop, done: Mutex::new(wait) }))
            }
        }
    }
}

/// A worker on the loop. An error costs the device: the worker goes, the driver is told.
struct OnLoop {
    worker: Option<Box<dyn Worker>>,
    interrupt: Interrupt,
    name: String,
}

impl MutEventSubscriber for OnLoop {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let Some(worker) = &mut self.worker else { return };
        if let Err(error) = worker.run() {
            let _ = ops.remove(Events::empty_raw(events.fd()));
            self.worker = None;
            broken(&self.name, &error, &self.interrupt);
        }
    }

    fn init(&mut self, _: &mut EventOps) {}
}

struct LoopRunning {
    endpoint: RemoteEndpoint<Subscriber>,
    id: SubscriberId,
}

impl Running for LoopRunning {}

impl Drop for LoopRunning {
    fn drop(&mut self) {
        let id = self.id;
        // Fails only when the loop has ended, and the worker with it.
        let _ = self.endpoint.call_blocking(move |ops| ops.remove_subscriber(id).map(drop));
    }
}

struct ThreadRunning {
    stop: EventFd,
    done: Mutex<mpsc::Receiver<()>>,
}

impl Running for ThreadRunning {}

impl Drop for ThreadRunning {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        // Nothing is ever sent: it ends when the worker is gone.
        let _ = self.done.lock().unwrap_or_else(PoisonError::into_inner).recv();
    }
}

fn run_on_thread(mut worker: Box<dyn Worker>, stop: &EventFd, interrupt: &Interrupt, name: &str) {
    let fd = worker.fd();
    loop {
        match wait(fd, stop) {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => return broken(name, &DeviceError::Host(error), interrupt),
        }
        if let Err(error) = worker.run() {
            return broken(name, &error, interrupt);
        }
    }
}

/// Waits for work; `true` means to stop.
fn wait(fd: RawFd, stop: &EventFd) -> io::Result<bool> {
    sys::wait_readable([stop.as_raw_fd(), fd]).map(|[stop, _]| stop)
}

fn broken(name: &str, error: &DeviceError, interrupt: &Interrupt) {
    interrupt.request_reset(&format!("{name}: device stopped, the guest must reset it"), error);
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn what_cannot_be_watched_is_an_error() {
        let mut event_loop = EventLoop::new().unwrap();
        let file = TempFile::new().unwrap();
        let mut watch = |fd| on_readable(&mut event_loop, fd, EventSet::IN, || ());
        assert!(watch(file.as_file().as_raw_fd()).is_err());
        assert!(watch(100_000).is_err());
    }

    #[test]
    fn first_reason_ends_the_loop() {
        let mut event_loop = EventLoop::new().unwrap();
        let stop = Stop::new().unwrap();
        stop.wake(&mut event_loop).unwrap();
        stop.set(1);
        stop.set(2);
        assert_eq!(event_loop.run_with_timeout(5000).unwrap(), 1);
        assert_eq!(stop.take(), Some(1));
    }
}
