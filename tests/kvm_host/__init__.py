"""Runs a command on a host whose KVM runs Linux: see docs/kvm-host.md."""
