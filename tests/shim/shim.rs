//! Preloaded into a process, kills it at a given change to the files below a folder. What the
//! folder holds then is what a machine finds that the process crashed on.
//!
//! | variable | says |
//! | --- | --- |
//! | `CRASH_DIR` | the folder, absolute and without symbolic links; only changes below it count |
//! | `CRASH_AT` | the number of the fatal change, from 1; 0 or none: the process lives |
//! | `CRASH_WHEN` | `after`: the fatal change is made; else it is not |
//! | `CRASH_FULL` | a file: while it exists, nothing can be written, for want of space |
//! | `CRASH_LOG` | gets a line `N name path` for each change that is begun, the fatal one too |
//! | `CLOCK_STEP` | a file of eight bytes, little-endian: by so many seconds the wall clock is off, at any moment |
//!
//! A change is a call of the C library that makes, writes, cuts, renames, flushes or removes
//! something, whether it succeeds or not; each process counts for itself. Not seen are changes by
//! way of a mapping, and system calls made without the library, as the crate rustix makes them.
//!
//! A function here may be called in any state of the process, in a child between fork and exec
//! too. So none of them allocates or takes a lock that somebody may hold.

#![expect(
    unsafe_code,
    reason = "functions of the C library are replaced by functions of their types"
)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io::{Cursor, Write as _};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicPtr, AtomicU64, Ordering};

use libc::{iovec, mode_t, off_t, size_t, ssize_t};

/// What the environment asks for.
struct Plan {
    dir: Spot,
    at: u64,
    after: bool,
    full: Option<&'static CStr>,
    log: Option<c_int>,
}

/// How many changes there were.
static CHANGES: AtomicU64 = AtomicU64::new(0);

impl Plan {
    /// The plan of this process, read when it first does something; none without a folder.
    fn get() -> Option<&'static Self> {
        static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
        PLAN.get_or_init(Self::read).as_ref()
    }

    fn read() -> Option<Self> {
        let dir = variable(c"CRASH_DIR")?.to_bytes();
        let at = variable(c"CRASH_AT").and_then(|n| n.to_str().ok()?.parse().ok());
        Some(Self {
            dir: Spot::default().add(dir.strip_suffix(b"/").unwrap_or(dir))?,
            at: at.unwrap_or(0),
            after: variable(c"CRASH_WHEN").is_some_and(|when| when == c"after"),
            full: variable(c"CRASH_FULL"),
            log: variable(c"CRASH_LOG").and_then(open_log),
        })
    }

    fn covers(&self, spot: &Spot) -> bool {
        let rest = spot.text().strip_prefix(self.dir.text());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
    }

    fn is_full(&self) -> bool {
        // SAFETY: the path is a string.
        let exists = |path: &CStr| unsafe { libc::access(path.as_ptr(), libc::F_OK) } == 0;
        self.full.is_some_and(exists)
    }

    fn note(&self, number: u64, name: &str, spot: &Spot) {
        let Some(log) = self.log else { return };
        let mut line = Cursor::new([0; Spot::MOST + 64]);
        let written = write!(line, "{number} {name} ")
            .and_then(|()| line.write_all(spot.text()))
            .and_then(|()| line.write_all(b"\n"));
        if written.is_ok() {
            // One call, so that the lines of two threads are not mixed.
            let (bytes, length) = (line.get_ref().as_ptr(), line.position());
            // SAFETY: the buffer has that many bytes. Not by `write`, which is ours.
            unsafe { libc::syscall(libc::SYS_write, log, bytes, length) };
        }
    }
}

fn variable(name: &CStr) -> Option<&'static CStr> {
    // SAFETY: the programs under test do not change their environment.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    // SAFETY: likewise; what is not null is a string.
    (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) })
}

fn open_log(path: &CStr) -> Option<c_int> {
    let flags = libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT | libc::O_CLOEXEC;
    let (at, path, mode): (c_int, _, c_uint) = (libc::AT_FDCWD, path.as_ptr(), 0o644);
    // SAFETY: the path is a string. Not by `open`, which is ours.
    let opened = unsafe { libc::syscall(libc::SYS_openat, at, path, flags, mode) };
    c_int::try_from(opened).ok().filter(|fd| *fd >= 0)
}

/// A path on the stack.
struct Spot {
    bytes: [u8; Self::MOST],
    length: usize,
}

impl Default for Spot {
    fn default() -> Self {
        Self {
            bytes: [0; Self::MOST],
            length: 0,
        }
    }
}

impl Spot {
    const MOST: usize = 4096;

    fn text(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn add(mut self, text: &[u8]) -> Option<Self> {
        let end = self.length + text.len();
        self.bytes.get_mut(self.length..end)?.copy_from_slice(text);
        self.length = end;
        Some(self)
    }

    /// What a descriptor stands for, whichever way it was made.
    fn of(fd: c_int) -> Option<Self> {
        let mut link = Cursor::new([0; 64]);
        if fd == libc::AT_FDCWD {
            write!(link, "/proc/self/cwd\0").ok()?;
        } else {
            write!(link, "/proc/self/fd/{fd}\0").ok()?;
        }
        let mut spot = Self::default();
        let (link, bytes) = (link.get_ref().as_ptr(), spot.bytes.as_mut_ptr());
        // SAFETY: the link's name ends with a zero, and the buffer is as long as is said.
        let length = unsafe { libc::readlink(link.cast(), bytes.cast(), Self::MOST) };
        spot.length = usize::try_from(length).ok()?;
        Some(spot)
    }

    /// A path as it is given to a call, made absolute.
    fn at(dir: c_int, path: *const c_char) -> Option<Self> {
        if path.is_null() {
            return None;
        }
        // SAFETY: who calls passes a string.
        let path = unsafe { CStr::from_ptr(path) }.to_bytes();
        if path.starts_with(b"/") {
            return Self::default().add(path);
        }
        Self::of(dir)?.add(b"/")?.add(path)
    }

    /// A path that is opened to be made or emptied.
    fn opened(dir: c_int, path: *const c_char, flags: c_int) -> Option<Self> {
        let changes = flags & (libc::O_CREAT | libc::O_TRUNC) != 0;
        changes.then(|| Self::at(dir, path)).flatten()
    }
}

/// Where a call leads, or else where it leads from: the first that counts.
fn either(to: Option<Spot>, from: Option<Spot>) -> Option<Spot> {
    let plan = Plan::get()?;
    to.filter(|spot| plan.covers(spot)).or(from)
}

/// Counts a change if it is one that counts, and makes it unless it is the end before, or there is
/// no space for it.
fn change<T: From<i8>>(
    name: &str,
    spot: impl FnOnce() -> Option<Spot>,
    make: impl FnOnce() -> T,
) -> T {
    let Some(plan) = Plan::get() else {
        return make();
    };
    let Some(spot) = spot().filter(|spot| plan.covers(spot)) else {
        return make();
    };
    let number = CHANGES.fetch_add(1, Ordering::SeqCst) + 1;
    plan.note(number, name, &spot);
    if number == plan.at && !plan.after {
        die();
    }
    if matches!(name, "write" | "copy") && plan.is_full() {
        // SAFETY: it is this thread's own.
        unsafe { *libc::__errno_location() = libc::ENOSPC };
        return T::from(-1);
    }
    let made = make();
    if number == plan.at {
        die();
    }
    made
}

fn die() -> ! {
    // SAFETY: nothing is passed that could be wrong.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    loop {
        std::hint::spin_loop();
    }
}

/// The function behind this library, by its name with a zero at the end.
fn next(name: &'static str, found: &AtomicPtr<c_void>) -> *mut c_void {
    let known = found.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    // SAFETY: the name is a string.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr().cast()) };
    if next.is_null() {
        std::process::abort();
    }
    found.store(next, Ordering::Relaxed);
    next
}

/// Replaces functions of the C library: the symbol, its name in the log, and what it changes.
macro_rules! hooks {
    ($($symbol:ident $name:literal ($($argument:ident: $type:ty),*) -> $result:ty, $spot:expr;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $symbol($($argument: $type),*) -> $result {
            static NEXT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
            let next = next(concat!(stringify!($symbol), "\0"), &NEXT);
            // SAFETY: it is the function that was called, so it has this type. `open` and its like
            // are declared with `...`; on Linux what is passed there lies where a parameter does.
            let next: unsafe extern "C" fn($($type),*) -> $result = unsafe { std::mem::transmute(next) };
            // SAFETY: who called answers for what was passed.
            change($name, || $spot, || unsafe { next($($argument),*) })
        }
    )* };
}

type Name = *const c_char;
type Bytes = *const c_void;

const HERE: c_int = libc::AT_FDCWD;

hooks! {
    open "open" (path: Name, flags: c_int, mode: mode_t) -> c_int, Spot::opened(HERE, path, flags);
    open64 "open" (path: Name, flags: c_int, mode: mode_t) -> c_int, Spot::opened(HERE, path, flags);
    openat "open" (dir: c_int, path: Name, flags: c_int, mode: mode_t) -> c_int, Spot::opened(dir, path, flags);
    openat64 "open" (dir: c_int, path: Name, flags: c_int, mode: mode_t) -> c_int, Spot::opened(dir, path, flags);
    write "write" (fd: c_int, bytes: Bytes, length: size_t) -> ssize_t, Spot::of(fd);
    writev "write" (fd: c_int, parts: *const iovec, count: c_int) -> ssize_t, Spot::of(fd);
    pwrite "write" (fd: c_int, bytes: Bytes, length: size_t, at: off_t) -> ssize_t, Spot::of(fd);
    pwrite64 "write" (fd: c_int, bytes: Bytes, length: size_t, at: off_t) -> ssize_t, Spot::of(fd);
    sendfile "copy" (to: c_int, from: c_int, at: *mut off_t, length: size_t) -> ssize_t, Spot::of(to);
    sendfile64 "copy" (to: c_int, from: c_int, at: *mut off_t, length: size_t) -> ssize_t, Spot::of(to);
    copy_file_range "copy" (from: c_int, read: *mut off_t, to: c_int, written: *mut off_t, length: size_t, flags: c_uint)
        -> ssize_t, Spot::of(to);
    ftruncate "truncate" (fd: c_int, length: off_t) -> c_int, Spot::of(fd);
    ftruncate64 "truncate" (fd: c_int, length: off_t) -> c_int, Spot::of(fd);
    fsync "fsync" (fd: c_int) -> c_int, Spot::of(fd);
    fdatasync "fdatasync" (fd: c_int) -> c_int, Spot::of(fd);
    rename "rename" (from: Name, to: Name) -> c_int, either(Spot::at(HERE, to), Spot::at(HERE, from));
    renameat "rename" (a: c_int, from: Name, b: c_int, to: Name) -> c_int, either(Spot::at(b, to), Spot::at(a, from));
    renameat2 "rename" (a: c_int, from: Name, b: c_int, to: Name, flags: c_uint) -> c_int,
        either(Spot::at(b, to), Spot::at(a, from));
    link "link" (from: Name, to: Name) -> c_int, Spot::at(HERE, to);
    linkat "link" (a: c_int, from: Name, b: c_int, to: Name, flags: c_int) -> c_int, Spot::at(b, to);
    symlink "link" (what: Name, path: Name) -> c_int, Spot::at(HERE, path);
    unlink "unlink" (path: Name) -> c_int, Spot::at(HERE, path);
    unlinkat "unlink" (dir: c_int, path: Name, flags: c_int) -> c_int, Spot::at(dir, path);
    rmdir "rmdir" (path: Name) -> c_int, Spot::at(HERE, path);
    mkdir "mkdir" (path: Name, mode: mode_t) -> c_int, Spot::at(HERE, path);
    mkdirat "mkdir" (dir: c_int, path: Name, mode: mode_t) -> c_int, Spot::at(dir, path);
}

/// By how many seconds the wall clock is off.
fn clock_step() -> i64 {
    static STEP: OnceLock<Option<&'static AtomicI64>> = OnceLock::new();
    let step = STEP.get_or_init(|| map_step(variable(c"CLOCK_STEP")?));
    step.map_or(0, |step| step.load(Ordering::Relaxed))
}

/// The file is mapped, so that whoever writes it sets the clock.
fn map_step(path: &CStr) -> Option<&'static AtomicI64> {
    let (at, path, flags) = (
        libc::AT_FDCWD,
        path.as_ptr(),
        libc::O_RDONLY | libc::O_CLOEXEC,
    );
    // SAFETY: the path is a string. Not by `open`, which is ours.
    let opened = unsafe { libc::syscall(libc::SYS_openat, at, path, flags) };
    let fd = c_int::try_from(opened).ok().filter(|fd| *fd >= 0)?;
    let size = size_of::<AtomicI64>();
    let nowhere = std::ptr::null_mut();
    // SAFETY: a new mapping, of a file that is as long.
    let mapped = unsafe { libc::mmap(nowhere, size, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
    // SAFETY: it stays mapped for ever, begins at a page, and others change it only as a whole.
    (mapped != libc::MAP_FAILED).then(|| unsafe { &*mapped.cast::<AtomicI64>() })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    static NEXT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
    type Call = unsafe extern "C" fn(libc::clockid_t, *mut libc::timespec) -> c_int;
    // SAFETY: it is the function that was called, so it has this type.
    let next: Call = unsafe { std::mem::transmute(next("clock_gettime\0", &NEXT)) };
    // SAFETY: who called answers for what was passed.
    let done = unsafe { next(clock, time) };
    if done == 0 && matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE) {
        // SAFETY: the time was written there a moment ago.
        unsafe { (*time).tv_sec += clock_step() };
    }
    done
}
