//! The pod's cgroup as a unit of systemd's, for the driver that has its cgroups from there (the kubelet's `systemd`).
//!
//! systemd wants to be the only writer of its tree, but for what it has delegated
//! (<https://systemd.io/CGROUP_DELEGATION>): what it does not know may lose its controllers at a reload. So it is asked for a
//! scope (systemd.scope(5)) with the shim in it, which is where the shim is by then. That takes milliseconds, for which no
//! start waits. The unit ends by itself when nobody is in it, also after a shim that was killed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{debug, warn};
use zbus::zvariant::{OwnedObjectPath, Value};
use zbus::{Connection, Result};

use crate::cgroup::Scope;

const NAME: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// Longest to wait for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Has systemd know of the scope in which this process is. One that refuses is told of in the log, `kept` is cleared, and
/// the pod goes on.
pub(crate) async fn register(scope: Scope, kept: Arc<AtomicBool>) {
    let unit = &scope.unit;
    let refused = match tokio::time::timeout(PATIENCE, start_transient(&scope)).await {
        Ok(Ok(())) => return debug!("{unit} is known to systemd"),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer in {} s", PATIENCE.as_secs()),
    };
    kept.store(false, Ordering::Relaxed);
    warn!("{unit} is not known to systemd, whose reload may take limits from it: {refused}");
}

async fn start_transient(Scope { slice, unit }: &Scope) -> Result<()> {
    let connection = Connection::system().await?;
    let properties = [
        ("Description", Value::from("krx pod")),
        ("Slice", slice.as_str().into()),
        ("Delegate", true.into()),
        ("PIDs", vec![std::process::id()].into()),
        // Neither to be stopped before what is needed for that, nor to be kept when it has failed.
        ("DefaultDependencies", false.into()),
        ("CollectMode", "inactive-or-failed".into()),
    ];
    // Units that would be made with it.
    let others: [(&str, Vec<(&str, Value<'_>)>); 0] = [];
    let request = (unit.as_str(), "fail", properties.as_slice(), others.as_slice());
    let job =
        connection.call_method(Some(NAME), OBJECT, Some(MANAGER), "StartTransientUnit", &request).await?;
    job.body().deserialize::<OwnedObjectPath>().map(drop)
}
