//! The program `containerd-shim-krx-v2`; all of it is in the library.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    krx_shim::main()
}
