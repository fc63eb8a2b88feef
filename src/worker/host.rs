//! The machine that a worker runs on: its hardware, and which of its processes live.

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use sha2::{Digest, Sha256};

use crate::protocol::heartbeat::HostFacts;
use crate::util::hardware;

/// Where process ids are valid: this boot of this kernel, and the PID namespace. A short digest, equal
/// for two processes that see each other under the same ids. None where the system does not tell.
pub(crate) fn pid_space() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let space = std::fs::read_link("/proc/self/ns/pid").ok()?;
    let digest = Sha256::digest(format!("{} {}", boot.trim(), space.display()));
    Some(hex::encode(&digest[..8]))
}

/// Resident memory of this process, in bytes.
pub(crate) fn rss(system: &mut sysinfo::System) -> u64 {
    let pid = sysinfo::Pid::from_u32(std::process::id());
    let kind = sysinfo::ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(sysinfo::ProcessesToUpdate::Some(&[pid]), true, kind);
    system.process(pid).map_or(0, sysinfo::Process::memory)
}

/// Whether there is a process with this id, even one that we may not see.
pub(crate) fn lives(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let signalled = pid.map(test_kill_process);
    signalled.is_some_and(|signalled| signalled != Err(Errno::SRCH))
}

/// The machine's hardware and system, as far as the system tells.
pub(crate) fn facts() -> HostFacts {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    HostFacts {
        cpu_model: hardware::cpu_model(),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
        ram_bytes: system.total_memory(),
        gpu_model: hardware::nvidia_models().into_iter().next(),
        gpu_memory_bytes: None,
        os: sysinfo::System::long_os_version().unwrap_or_default(),
        arch: std::env::consts::ARCH.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_lives_until_it_exits_and_unused_ids_do_not() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        assert!(lives(pid) && lives(std::process::id()));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!lives(pid));
        assert!(!lives(0) && !lives(u32::MAX));
        // Of another user, as `init` is for most.
        assert!(lives(1));
    }

    #[test]
    fn neighbouring_processes_share_one_pid_space() {
        assert!(pid_space().is_some_and(|space| space.len() == 16));
        assert_eq!(pid_space(), pid_space());
    }
}
