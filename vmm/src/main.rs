//! `krx-vmm`: one micro-VM as one process. The thin part around the library: arguments in, exit code out.

use std::fs::File;
use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;

use krx_vmm::config::{Config, ConfigError, ValidConfig};
use krx_vmm::exit_code::ExitCode;
use krx_vmm::jail::{self, Jailed};
use krx_vmm::klog::KlogError;
use krx_vmm::machine::{self, Inherited, Machine, MachineError, Opened, Outcome};
use krx_vmm::phase::{self, Phase};
use krx_vmm::virtio::net::Net;
use krx_vmm::{report, share, sys};

const USAGE: &str = "\
Usage: krx-vmm --config FILE | --config-fd N
Runs one micro-VM as its configuration says (JSON, see docs/vmm.md).

  --config FILE    read the configuration from FILE
  --config-fd N    read it from the inherited descriptor N
  --version        print the version
  --help           print this

Exit codes: 0 powered off, 2 configuration, 3 host, 4 boot timeout, 5 guest panic, 6 guest crash,
7 stopped from outside, 8 guest reset.";

/// Largest configuration; stops an endless file from filling memory.
const MAX_CONFIG: u64 = 1 << 20;

fn main() -> std::process::ExitCode {
    phase::mark(Phase::Main);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let code = match arguments.as_slice() {
        ["--config", path] => {
            run_from(File::open(path).map_err(|e| format!("Cannot open {path}\n  because: {e}")))
        }
        ["--config-fd", number] => run_from(inherited(number)),
        ["--version"] => print(concat!("krx-vmm ", env!("CARGO_PKG_VERSION"))),
        ["--help"] => print(USAGE),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::Config
        }
    };
    code.into()
}

fn print(text: &str) -> ExitCode {
    // A standard output that is closed is no reason to fail.
    let _ = writeln!(std::io::stdout(), "{text}");
    ExitCode::PowerOff
}

fn inherited(number: &str) -> Result<File, String> {
    if number == "0" {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned();
        return stdin.map(File::from).map_err(|e| format!("Standard input cannot be read\n  because: {e}"));
    }
    let fd = number.parse().map_err(|_| format!("--config-fd needs a descriptor number, not {number}"))?;
    let file = sys::adopt(fd).map_err(|e| format!("--config-fd {fd} cannot be read\n  because: {e}"))?;
    Ok(file.into())
}

fn run_from(file: Result<File, String>) -> ExitCode {
    let config = match file.and_then(|file| read(file).map_err(|error| report::chain(&error))) {
        Ok(config) => config,
        Err(message) => return fail(ExitCode::Config, &message),
    };
    run(config)
}

fn read(file: File) -> Result<ValidConfig, ConfigError> {
    let mut json = Vec::new();
    file.take(MAX_CONFIG).read_to_end(&mut json).map_err(ConfigError::Read)?;
    Config::from_json(&json)?.validate()
}

fn run(config: ValidConfig) -> ExitCode {
    // First of all: a number that was not inherited must not be that of something opened here.
    let inherited = match inherit(&config) {
        Ok(inherited) => inherited,
        Err(message) => return fail(ExitCode::Config, &message),
    };
    let opened = match Opened::open(&config) {
        Ok(opened) => opened,
        Err(error) => return fail(start_failure(&error), &report::chain(&error)),
    };
    let Jailed { config, mut janitor } = match enclose(config) {
        Ok(jailed) => jailed,
        Err(message) => return fail(ExitCode::Host, &message),
    };
    phase::mark(Phase::Configured);
    // Never dropped: that would wait for the file server's thread, which a file system of the host can make wait for
    // ever. The process ends now, and all it holds with it.
    let mut machine = match Machine::start(&config, opened, inherited) {
        Ok(machine) => ManuallyDrop::new(machine),
        Err(error) => return fail(start_failure(&error), &report::chain(&error)),
    };
    let code = match machine.run() {
        Ok(Outcome::Orphaned) => {
            machine::clean_up_for_owner(&config, janitor.take());
            ExitCode::Stopped
        }
        Ok(outcome) => finish(&outcome, &machine, &config),
        Err(error) => fail(ExitCode::Host, &report::chain(&error)),
    };
    machine::clean_up(&config);
    code
}

/// The jail; or only the share, if there is to be none.
fn enclose(config: ValidConfig) -> Result<Jailed, String> {
    if config.jail {
        return jail::enter(config).map_err(|error| report::chain(&error));
    }
    // A standard error that is closed is no reason to fail.
    let _ = writeln!(
        std::io::stderr(),
        "krx-vmm: NOT JAILED: a guest that takes over this process is root on the host"
    );
    // As in a jail. Who is not root can neither, nor serve files of other users.
    let _ = jail::capabilities::keep_for_all_users();
    if let Some(share) = &config.share {
        share::mount(share).map_err(|error| report::chain(&error))?;
    }
    Ok(Jailed { config, janitor: None })
}

fn inherit(config: &ValidConfig) -> Result<Inherited, String> {
    let lifeline = config.lifeline_fd.map(sys::adopt).transpose();
    let lifeline = lifeline.map_err(|error| report::chain(&MachineError::Lifeline(error)))?;
    let interfaces = Net::inherit(&config.net).map_err(|error| report::chain(&error))?;
    Ok(Inherited { lifeline, interfaces })
}

fn start_failure(error: &MachineError) -> ExitCode {
    match error {
        MachineError::Kernel(_) | MachineError::Boot(_) | MachineError::Lifeline(_) => ExitCode::Config,
        _ => ExitCode::Host,
    }
}

/// Says how the guest ended, with its kernel's last words where it ended badly.
fn finish(outcome: &Outcome, machine: &Machine, config: &ValidConfig) -> ExitCode {
    let (code, message) = match outcome {
        Outcome::PowerOff => return ExitCode::PowerOff,
        Outcome::Stopped => {
            (ExitCode::Stopped, "Stopped from outside, before the guest had powered off".to_string())
        }
        Outcome::Orphaned => return ExitCode::Stopped,
        Outcome::Reset => {
            return fail(ExitCode::GuestReset, "The guest reset itself; micro-VMs are not started again");
        }
        Outcome::Panic => (ExitCode::GuestPanic, "The guest's kernel panicked".to_string()),
        Outcome::Crash { crash, vcpu, instruction } => (
            ExitCode::GuestCrash,
            format!("{} on vCPU {vcpu} at instruction {instruction:#x}", crash.meaning()),
        ),
        Outcome::RunFailed(error) => {
            (ExitCode::GuestCrash, format!("KVM cannot run the guest\n  because: {error}"))
        }
        Outcome::BootTimeout => {
            let limit = duration(config.boot_timeout_ms);
            (ExitCode::Boot, format!("The guest did not reach PID 1 within the boot timeout of {limit}"))
        }
    };
    fail(code, &format!("{message}\n{}", describe(machine.last_words())))
}

/// For people: whole seconds as such.
fn duration(ms: u64) -> String {
    if ms.is_multiple_of(1000) { format!("{} s", ms / 1000) } else { format!("{ms} ms") }
}

fn describe(log: Result<String, KlogError>) -> String {
    match log {
        Ok(log) => format!("The guest's kernel log ends with:\n{log}"),
        Err(KlogError::Empty) => "The guest's kernel has logged nothing.".into(),
        Err(error) => format!(
            "The guest's kernel log cannot be read; with `console` in the configuration it is shown live\n  because: {}",
            report::chain(&error)
        ),
    }
}

fn fail(code: ExitCode, message: &str) -> ExitCode {
    // A standard error that is closed is no reason for another exit code.
    let _ = writeln!(std::io::stderr(), "krx-vmm: {message}");
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_guest_is_no_failure_to_read() {
        assert_eq!(describe(Err(KlogError::Empty)), "The guest's kernel has logged nothing.");
        let text = describe(Err(KlogError::NoSymbols));
        assert_eq!(text.matches("console").count(), 1, "{text}");
        assert!(!text.contains("--console"), "{text}");
    }

    #[test]
    fn timeouts_are_said_as_they_were_given() {
        assert_eq!([500, 1000, 1500, 60_000].map(duration), ["500 ms", "1 s", "1500 ms", "60 s"]);
    }
}
