//! The program is a kernel: no C runtime, and at a fixed address in the guest's first memory.

fn main() {
    for argument in ["-nostartfiles", "-static", "-no-pie", "-Wl,--image-base=0x100000,--build-id=none"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
