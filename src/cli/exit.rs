//! How a command ends: exit codes, and the errors that lead to them.

use crate::worker::Stop;

/// How a command ends; the numbers are the contract's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::EnumIter, strum::EnumMessage)]
pub enum Exit {
    /// Done, or drained.
    Done = 0,
    /// The command's own negative answer.
    Negative = 1,
    /// Bad usage or configuration.
    Usage = 64,
    /// Bad input data.
    Data = 65,
    /// A service or device is not available.
    Unavailable = 69,
    /// An internal error.
    Internal = 70,
    /// The deadline of the drain, or a second signal, cut a computation short.
    CutShort = 75,
}

impl Exit {
    /// Of a command whose answer is yes or no.
    pub(super) fn of_answer(yes: bool) -> Self {
        if yes { Self::Done } else { Self::Negative }
    }
}

/// An error that ends a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) exit: Exit,
    pub(super) message: String,
}

impl Fault {
    pub(super) fn new(exit: Exit, message: impl std::fmt::Display) -> Self {
        Self {
            exit,
            message: message.to_string(),
        }
    }

    pub(super) fn usage(message: impl std::fmt::Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub(super) fn data(message: impl std::fmt::Display) -> Self {
        Self::new(Exit::Data, message)
    }

    pub(super) fn unavailable(message: impl std::fmt::Display) -> Self {
        Self::new(Exit::Unavailable, message)
    }

    pub(super) fn internal(error: impl std::fmt::Display) -> Self {
        Self::new(Exit::Internal, error)
    }
}

pub(super) type Outcome = Result<Exit, Fault>;

/// Ends the process when a drain takes too long.
pub(super) fn leave_overdue(stop: Stop) {
    leave(exit_of(stop));
}

pub(super) fn exit_of(stop: Stop) -> Exit {
    match stop {
        Stop::Drained => Exit::Done,
        Stop::CutShort => Exit::CutShort,
        Stop::Stuck | Stop::PartLost(_) => Exit::Internal,
    }
}

/// Ends the process without running the destructors of a return from `main`: ONNX Runtime's would free
/// memory that the engine thread, which cannot be stopped during a load, still uses, and a drain during a
/// load would be a segmentation fault.
pub(super) fn leave(exit: Exit) -> ! {
    // Answers have been flushed and checked; help texts have not.
    drop(std::io::Write::flush(&mut std::io::stdout()));
    #[expect(unsafe_code, reason = "there is no safe way to end a process at once")]
    // SAFETY: it takes any number, never returns, and touches no memory of ours.
    unsafe {
        libc::_exit(exit as i32)
    }
}
