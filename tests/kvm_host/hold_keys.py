"""Keeps KVM's static keys from flipping on a multi-threaded emulated host.

KVM patches its own code when the first vCPU without a local APIC, or with a disabled one, comes and when the last one goes. Under
QEMU's multi-threaded TCG another CPU can execute the breakpoint of a patch that is finished, which kills the host's
kernel. A vCPU of each sort that lives as long as the host keeps the patched code as it is; they never run.
"""

import fcntl
import os
import signal

KVM_CREATE_VM = 0xAE01
KVM_CREATE_VCPU = 0xAE41
KVM_CREATE_IRQCHIP = 0xAE60

kvm = os.open("/dev/kvm", os.O_RDWR)
without_apic = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
fcntl.ioctl(without_apic, KVM_CREATE_VCPU, 0)
with_apic = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
fcntl.ioctl(with_apic, KVM_CREATE_IRQCHIP)
fcntl.ioctl(with_apic, KVM_CREATE_VCPU, 0)
signal.pause()
