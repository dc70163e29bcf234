//! What is typed. `run` and `exec` turn it into what is valid.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::confinement::Confinement;

#[derive(Debug, Parser)]
#[command(name = "krx", version, about = "Runs containers in micro-VMs", after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes of run and exec: the process's own; 128+n if signal n ended it; 127 command not found, 126 not executable, \
125 krx itself failed.
Settings: /etc/krx/config.toml, or the file that KRX_CONFIG names. Options and environment go before them.
Environment: KRX_STATE_DIR (default /run/krx), KRX_IMAGE_DIR (default /var/lib/krx/images), KRX_KERNEL, KRX_INITRAMFS, KRX_VMM, KRX_BOOT_TIMEOUT (seconds).";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a command in a container in a micro-VM of its own
    Run(Box<Run>),
    /// Runs a further command in the container of a running pod
    Exec(Exec),
    /// Prints the log of the kernel in a running pod
    Console(Console),
    /// Prints the output of a detached container
    Logs(Logs),
    /// Shows the output of a detached container as it comes, and types into it
    Attach(Attach),
    /// Waits for the end of detached containers and prints their exit codes
    Wait(Wait),
    /// Lists running pods
    Ps(Ps),
    /// Shows what running pods use
    Stats(StatsOptions),
    /// Prints what is known of a pod, as JSON
    Inspect(Inspect),
    /// Ends pods: by SIGTERM, and by SIGKILL after a while
    Stop(Stop),
    /// Sends a signal to the first process of a pod
    Kill(Kill),
    /// Removes what is left of detached containers
    Rm(Rm),
    /// Checks whether this host can run micro-VMs
    Doctor(Doctor),
    /// Prints the completions of a shell
    Completions(Completions),
    /// Writes the man pages, for what installs them
    #[command(hide = true)]
    Man(Man),
}

/// Options that `run` and `exec` share: what the process is.
#[derive(Debug, Clone, Args)]
pub(crate) struct ProcessOptions {
    /// Environment variable; without a value the caller's own is taken
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// File with environment variables, one a line as for --env
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Gives the process a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Connects standard input
    #[arg(short, long)]
    pub(crate) interactive: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Root file system: a directory
    #[arg(long, value_name = "DIR", conflicts_with = "bundle")]
    pub(crate) rootfs: Option<PathBuf>,
    /// OCI bundle: a directory with a config.json
    #[arg(long, value_name = "DIR")]
    pub(crate) bundle: Option<PathBuf>,
    /// Image: oci:DIR, oci-archive:FILE or docker-archive:FILE, with :TAG where it has several
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["rootfs", "bundle"])]
    pub(crate) image: Option<String>,
    /// Program to run in the stead of the image's entrypoint and command
    #[arg(long, value_name = "PROGRAM", requires = "image", conflicts_with_all = ["rootfs", "bundle"])]
    pub(crate) entrypoint: Option<String>,
    /// CPUs, 0.01 to 8; with a fraction, of virtual ones by the next whole number [default: the settings', 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) cpus: Option<String>,
    /// Memory of the VM: bytes, or a number with K, M, G or T [default: the settings', 256M]
    #[arg(short, long, value_name = "SIZE", allow_negative_numbers = true)]
    pub(crate) memory: Option<String>,
    #[command(flatten)]
    pub(crate) process: ProcessOptions,
    #[command(flatten)]
    pub(crate) confinement: Confinement,
    /// Directory or file of the host to show in the container
    #[arg(short, long = "volume", value_name = "HOST:GUEST[:ro]")]
    pub(crate) volumes: Vec<String>,
    /// The root file system cannot be written
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Host name in the container (the pod's name unless given)
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Name of the pod
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Runs it in the background and prints its name
    #[arg(short, long, conflicts_with_all = ["console", "timings"])]
    pub(crate) detach: bool,
    /// With -d: leaves nothing after the end
    #[arg(long)]
    pub(crate) rm: bool,
    /// Label, for `krx ps --filter` and `krx inspect`
    #[arg(short, long = "label", value_name = "KEY[=VALUE]")]
    pub(crate) labels: Vec<String>,
    /// This process is what `krx run -d` starts
    #[arg(long, hide = true, requires = "detach")]
    pub(crate) owner: bool,
    /// File of the network namespace whose interfaces the pod gets (no network unless given)
    #[arg(long, value_name = "FILE")]
    pub(crate) netns: Option<PathBuf>,

    /// Do not jail the VMM: for debugging, with guests that are trusted as the host's root is
    #[arg(long)]
    pub(crate) no_jail: bool,
    /// Guest kernel: a vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Shows the guest kernel's console on standard error
    #[arg(long)]
    pub(crate) console: bool,
    /// Prints when each phase of the start was reached, on standard error, after the end
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub(crate) timings: Option<TimingsFormat>,
    /// Command and arguments; a bundle and an image have their own unless one is given
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TimingsFormat {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    #[command(flatten)]
    pub(crate) process: ProcessOptions,
    /// Container of a pod of containerd's, by its id or the begin of it (the only one unless given)
    #[arg(short, long, value_name = "ID")]
    pub(crate) container: Option<String>,
    /// Name of the pod
    pub(crate) name: String,
    /// Command and arguments
    #[arg(value_name = "CMD", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Console {
    /// Name of the pod
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Goes on with what is written, until the container ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// The last lines only
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) tail: Option<usize>,
    /// When each line was written
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Name of the pod
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// Types nothing into it
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// Whether signals are passed on to the container
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub(crate) sig_proxy: bool,
    /// Name of the pod
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// Names of pods
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// Kills those that run
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Names of pods
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// Seconds until SIGKILL
    #[arg(short, long, default_value_t = 10, value_name = "SECONDS")]
    pub(crate) time: u32,
    /// Names of pods
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Those that have ended, too, and how
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Names only
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) quiet: bool,
    /// Only those that fit: label=KEY[=VALUE], name=PART, status=running|starting|exited|dead
    #[arg(short, long = "filter", value_name = "KEY=VALUE")]
    pub(crate) filters: Vec<String>,
    /// Prints JSON, one array of objects
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StatsOptions {
    /// Prints JSON, one array of objects
    #[arg(long)]
    pub(crate) json: bool,
    /// Names of pods (all unless given)
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Name of the pod
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// Signal, by name or number
    #[arg(short, long, default_value = "TERM", value_name = "SIGNAL")]
    pub(crate) signal: String,
    /// Name of the pod
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct Man {
    /// Where to write them
    pub(crate) directory: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Prints JSON
    #[arg(long)]
    pub(crate) json: bool,
}
