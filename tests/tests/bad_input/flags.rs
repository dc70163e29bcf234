//! Command lines that no command has.

use crate::desk::Desk;

#[test]
fn options_of_run_that_cannot_be() {
    let desk = Desk::new();
    let long = "h".repeat(65);
    let cases: &[(&[&str], &[&str])] = &[
        (&["--colour"], &["--colour", "Usage", "--help"]),
        (&["--memory"], &["--memory", "value is required"]),
        (&["--memory", "0"], &["Memory", "32 to"]),
        (&["--memory", "1M"], &["Memory", "32 to"]),
        (&["--memory", "2T"], &["Memory", "32 to"]),
        (&["--memory", "1T"], &["1048576 MiB", "--memory"]),
        (&["--memory", "1P"], &["Memory", "32 to"]),
        (&["--memory", "12X"], &["12X", "256M"]),
        (&["--memory", "M"], &["`M`", "256M"]),
        (&["--memory", "1.5G"], &["1.5G", "256M"]),
        (&["--memory", "256 M"], &["256 M", "256M"]),
        (&["--memory", "-1"], &["-1", "256M"]),
        (&["--memory", "99999999999999999999G"], &["Memory", "256M"]),
        (&["--memory", "256M", "--memory", "512M"], &["--memory", "multiple times"]),
        (&["--cpus"], &["--cpus", "value is required"]),
        (&["--cpus", "0"], &["CPUs `0`", "0.01 to 8"]),
        (&["--cpus", "9"], &["CPUs `9`", "0.01 to 8"]),
        (&["--cpus", "-1"], &["CPUs `-1`", "0.01 to 8"]),
        (&["--cpus", "1e1"], &["CPUs `1e1`", "0.01 to 8"]),
        (&["--cpus", "two"], &["CPUs `two`", "0.01 to 8"]),
        (&["-v"], &["--volume", "value is required"]),
        (&["-v", "/data"], &["/data", "HOST:GUEST"]),
        (&["-v", ""], &["HOST:GUEST"]),
        (&["-v", ":"], &["HOST:GUEST"]),
        (&["-v", "/tmp:/a:rx"], &["/tmp:/a:rx", "HOST:GUEST:ro"]),
        (&["-v", "/tmp:/a:ro:ro"], &["HOST:GUEST:ro"]),
        (&["-v", "/tmp:data"], &["data", "absolute"]),
        (&["-v", "/tmp:/../data"], &["/../data", "`..`"]),
        (&["-v", "/tmp:/"], &["below /"]),
        (&["-v", "/none:/data"], &["/none", "No such file"]),
        (&["-v", "/tmp:/data", "-v", "/run:/data/"], &["/data", "twice"]),
        // There are no ports to publish: the pod has the network that it is given.
        (&["--publish", "8080:70000"], &["--publish", "Usage"]),
        (&["--rootfs", "root"], &["--rootfs", "multiple times"]),
        (&["--bundle", "bundle"], &["--bundle", "cannot be used with"]),
        (&["--image", "oci:x"], &["--image", "cannot be used with"]),
        (&["--entrypoint", "sh"], &["--entrypoint", "cannot be used with"]),
        (&["--name", "../x"], &["../x", "1 to 76 letters"]),
        (&["--name", ""], &["1 to 76 letters"]),
        (&["--hostname", &long], &["Host name", "1 to 64 bytes"]),
        (&["--hostname", "a/b"], &["Host name", "slashes"]),
        (&["-u", "no-such-user"], &["no-such-user"]),
        (&["-u", "4294967296"], &["4294967296"]),
        (&["-w", "tmp"], &["Working directory", "absolute"]),
        (&["-t", "-i"], &["not a terminal", "leave out"]),
        (&["-e", "=x"], &["`=x`", "no name"]),
        (&["--env-file", "none"], &["none", "No such file"]),
        (&["--env-file", "/dev/zero"], &["/dev/zero", "4 MiB"]),
        (&["--pids-limit", "0"], &["`0`", "-1 for none"]),
        (&["--ulimit", "files=1"], &["files=1", "nofile"]),
        (&["--ulimit", "nofile=2:1"], &["nofile=2:1", "hard"]),
        (&["--cap-add", "nonsense"], &["nonsense", "capabilities(7)"]),
        (&["--security-opt", "apparmor=x"], &["apparmor=x", "seccomp=FILE"]),
        (&["--security-opt", "seccomp=none"], &["none", "No such file"]),
        (&["--tmpfs", "relative"], &["relative", "absolute"]),
        (&["--tmpfs", "/data/", "-v", "/tmp:/data"], &["/data", "twice", "leave one"]),
        (&["--tmpfs", "/a:bind"], &["bind", "--tmpfs"]),
        (&["--kernel", "none"], &["none", "--kernel"]),
        (&["--timings=yaml"], &["yaml", "table, json"]),
        (&["true"], &["true", "Usage"]),
    ];
    for (options, words) in cases {
        let arguments = [*options, &["--", "true"]].concat();
        desk.refused(&format!("run {}", options.join(" ")), &mut desk.run(&arguments), words);
    }
    desk.refused("run of nothing", &mut desk.krx(&["run", "--", "true"]), &["Give one of --rootfs DIR"]);
    desk.refused("run without a command", &mut desk.run(&[]), &["Give a command after `--`"]);
    desk.refused("an empty command", &mut desk.run(&["--"]), &["Give a command after `--`"]);
}

#[test]
fn files_and_variables_that_cannot_be() {
    let desk = Desk::new();
    let run = || desk.run(&["--env-file", "variables", "--", "true"]);
    desk.write("variables", format!("A={}\n", "x".repeat(1 << 20)));
    desk.refused("a megabyte of variable", &mut run(), &["env[", "1048578", "131071"]);
    desk.write("variables", "A=b\0c\n");
    desk.refused("a NUL in a variable", &mut run(), &["has no name or has a NUL"]);
    desk.write("variables", b"A=\xff\n");
    desk.refused("no text", &mut run(), &["variables", "UTF-8"]);
    desk.write("variables", vec![b'\n'; (4 << 20) + 1]);
    desk.refused("a file of 4 MiB and more", &mut run(), &["variables", "4 MiB"]);
    for value in ["", "0", "-1", "soon", "86401"] {
        let mut krx = desk.run(&["--", "true"]);
        desk.refused("a timeout", krx.env("KRX_BOOT_TIMEOUT", value), &["KRX_BOOT_TIMEOUT", "1 to 86400"]);
    }
    for (what, settings, words) in [
        ("an unknown setting", "[vm]\ncolour = 1\n", &["odd.toml:2", "colour"][..]),
        ("no TOML", "{}", &["odd.toml:1"]),
        ("memory that cannot be", "[vm]\nmemory_mib = 1\n", &["odd.toml:2", "32 to"]),
        ("CPUs that cannot be", "[vm]\ncpus = 0\n", &["odd.toml:2"]),
    ] {
        desk.write("odd.toml", settings);
        let mut krx = desk.run(&["--", "true"]);
        desk.refused(what, krx.env("KRX_CONFIG", desk.path("odd.toml")), words);
    }
}

#[test]
fn other_commands_that_cannot_be() {
    let desk = Desk::new();
    let unknown: &[&str] = &["No pod named none", "krx ps"];
    let cases: &[(&[&str], &[&str])] = &[
        (&["rnu"], &["rnu", "Usage"]),
        (&["--verbose"], &["--verbose", "Usage"]),
        (&["exec"], &["<NAME>", "Usage"]),
        (&["exec", "none"], &["<CMD>", "Usage"]),
        (&["exec", "none", "true"], unknown),
        (&["exec", "../x", "true"], &["../x", "cannot name a pod"]),
        (&["exec", "--colour", "none", "true"], &["--colour", "Usage"]),
        (&["exec", "-w", "tmp", "none", "true"], &["Working directory", "absolute"]),
        (&["exec", "-t", "-i", "none", "true"], &["not a terminal"]),
        (&["exec", "-e"], &["--env", "value is required"]),
        (&["console"], &["<NAME>", "Usage"]),
        (&["console", "none"], unknown),
        (&["console", "none", "more"], &["more", "Usage"]),
        (&["ps", "none"], &["none", "Usage"]),
        (&["ps", "--jsno"], &["--jsno", "--json"]),
        (&["stats", "none"], unknown),
        (&["stats", "--all"], &["--all", "Usage"]),
        (&["stats", ""], &["cannot name a pod"]),
        (&["inspect"], &["<NAME>", "Usage"]),
        (&["inspect", "none"], unknown),
        (&["inspect", "a", "b"], &["Usage"]),
        (&["kill"], &["<NAME>", "Usage"]),
        (&["kill", "none"], unknown),
        (&["kill", "-s"], &["--signal", "value is required"]),
        (&["kill", "-s", "65", "none"], &["`65`", "1 to 64"]),
        (&["kill", "-s", "LOUD", "none"], &["`LOUD`", "not a signal"]),
        (&["kill", "-9", "none"], &["-9", "Usage"]),
        (&["doctor", "me"], &["me", "Usage"]),
        (&["doctor", "--fix"], &["--fix", "Usage"]),
        (&["completions"], &["<SHELL>", "Usage"]),
        (&["completions", "tcsh"], &["tcsh", "bash"]),
        (&["man"], &["<DIRECTORY>", "Usage"]),
        (&["man", "kernel/pages"], &["kernel/pages", "Not a directory"]),
    ];
    for (arguments, words) in cases {
        desk.refused(&arguments.join(" "), &mut desk.krx(arguments), words);
    }
}
