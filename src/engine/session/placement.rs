//! Where ONNX Runtime put the nodes of a session. A provider without a kernel for a node leaves it to the
//! CPU, and one that does not start leaves all of them; neither is an error there.

use std::collections::HashSet;
use std::ffi::{CStr, c_char};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};

use ort::AsPointer;
use ort::session::Session;
use ort::sys;

use super::SessionError;
use crate::model::onnx::{NodeRef, computing};

/// The configuration entry by which a session keeps where its nodes are.
pub(super) const RECORD: &str = "session.record_ep_graph_assignment_info";

/// Nodes that a refusal names.
const NAMED: usize = 10;

/// Where the nodes of a session run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// Nodes on the device that was asked for.
    pub device: usize,
    /// Nodes on the host instead: arithmetic on shapes and indices, and nothing else.
    pub host_nodes: Vec<NodeRef>,
}

impl Placement {
    /// Reads it from a session; every node that is not on this provider is on the host. Fails if all are.
    pub(super) fn of(session: &Session, provider: &str) -> Result<Self, SessionError> {
        let mut placement = Self::default();
        for (at, node) in assigned(session)? {
            match at == provider {
                true => placement.device += 1,
                false => placement.host_nodes.push(node),
            }
        }
        if placement.device > 0 {
            return Ok(placement);
        }
        Err(SessionError::Unavailable(format!(
            "{provider} runs no node of the graph; elsewhere are {}: {}",
            placement.host_nodes.len(),
            placement.host_in_words()
        )))
    }

    /// Adds the nodes of another part of the same graph.
    pub(super) fn add(&mut self, part: Self) {
        self.device += part.device;
        self.host_nodes.extend(part.host_nodes);
    }

    /// The nodes on the host: the first of them by name, and how many more.
    pub fn host_in_words(&self) -> String {
        named(&self.host_nodes)
    }

    /// Fails if a node on the host reads a weight or computes on what depends on one.
    pub(super) fn judge(
        &self,
        optimised: Vec<u8>,
        weights: &[String],
        derived: &[String],
        provider: &str,
    ) -> Result<(), SessionError> {
        let unreadable = |e| SessionError::Model(format!("the optimised graph: {e}"));
        let [weights, derived]: [HashSet<&str>; 2] =
            [weights, derived].map(|names| names.iter().map(String::as_str).collect());
        let computing = computing(optimised.into(), &weights, &derived, &self.host_nodes);
        let computing = computing.map_err(unreadable)?;
        if computing.is_empty() {
            return Ok(());
        }
        Err(SessionError::Unavailable(format!(
            "{provider} leaves {} of {} nodes that compute with weights to the CPU, and a worker uses no other device than \
             the one asked for: {}; export the model without these operators, or use another provider",
            computing.len(),
            self.device + self.host_nodes.len(),
            named(&computing)
        )))
    }
}

fn named(nodes: &[NodeRef]) -> String {
    let shown = nodes.iter().take(NAMED);
    let shown: Vec<String> = shown
        .map(|node| match node.name.as_str() {
            "" => format!("a {} without a name", node.operator),
            name => format!("{name} ({})", node.operator),
        })
        .collect();
    let shown = shown.join(", ");
    match nodes.len().saturating_sub(NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Every node of the optimised graph, with the name of the provider that runs it.
fn assigned(session: &Session) -> Result<Vec<(String, NodeRef)>, SessionError> {
    let api = ort::api();
    let mut found = Vec::new();
    #[expect(unsafe_code, reason = "ort has no safe interface to this")]
    // SAFETY: the session is alive, and everything below is its own and lives as long. Each call gets the
    // pointers that the one before it returned, and places of our own to write to.
    unsafe {
        let parts =
            list(|all, count| (api.Session_GetEpGraphAssignmentInfo)(session.ptr(), all, count))?;
        for part in parts {
            let provider = text(|out| (api.EpAssignedSubgraph_GetEpName)(part, out))?;
            let nodes = list(|all, count| (api.EpAssignedSubgraph_GetNodes)(part, all, count))?;
            for node in nodes {
                let node = NodeRef {
                    name: text(|out| (api.EpAssignedNode_GetName)(node, out))?,
                    domain: text(|out| (api.EpAssignedNode_GetDomain)(node, out))?,
                    operator: text(|out| (api.EpAssignedNode_GetOperatorType)(node, out))?,
                };
                found.push((provider.clone(), node));
            }
        }
    }
    Ok(found)
}

/// A list that ONNX Runtime returns as an array of pointers, none of them null.
///
/// # Safety
/// `call` fills in an array and its length, or returns an error.
#[expect(unsafe_code, reason = "ort has no safe interface to this")]
unsafe fn list<T>(
    call: impl FnOnce(*mut *const *const T, *mut usize) -> sys::OrtStatusPtr,
) -> Result<Vec<*const T>, SessionError> {
    let (mut all, mut count) = (std::ptr::null(), 0);
    let status = call(&raw mut all, &raw mut count);
    // SAFETY: the status is the call's and is released here once.
    unsafe { ort::Error::result_from_status(status) }?;
    if all.is_null() || count == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the array is not null and has `count` entries.
    let entries = unsafe { std::slice::from_raw_parts(all, count) };
    match entries.iter().any(|entry| entry.is_null()) {
        true => Err(missing()),
        false => Ok(entries.to_vec()),
    }
}

/// A text that ONNX Runtime returns as a pointer.
///
/// # Safety
/// `call` fills in a text that ends in zero, or returns an error.
#[expect(unsafe_code, reason = "ort has no safe interface to this")]
unsafe fn text(
    call: impl FnOnce(*mut *const c_char) -> sys::OrtStatusPtr,
) -> Result<String, SessionError> {
    let mut text = std::ptr::null();
    let status = call(&raw mut text);
    // SAFETY: the status is the call's and is released here once.
    unsafe { ort::Error::result_from_status(status) }?;
    if text.is_null() {
        return Err(missing());
    }
    // SAFETY: it is not null and ends in zero.
    Ok(unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned())
}

fn missing() -> SessionError {
    SessionError::Other("ONNX Runtime does not say where a node is".into())
}

/// A file in memory into which a session writes its optimised graph: it needs no folder, and nothing of it
/// stays behind.
pub(super) struct Optimised(std::fs::File);

impl Optimised {
    pub(super) fn new() -> Result<Self, SessionError> {
        let made = rustix::fs::memfd_create("optimised", rustix::fs::MemfdFlags::CLOEXEC);
        let made = made.map_err(|e| SessionError::Other(format!("no file in memory: {e}")))?;
        Ok(Self(made.into()))
    }

    pub(super) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_fd().as_raw_fd())
    }

    pub(super) fn read(mut self) -> Result<Vec<u8>, SessionError> {
        let mut graph = Vec::new();
        let read = self.0.read_to_end(&mut graph);
        read.map_err(|e| SessionError::Other(format!("the optimised graph: {e}")))?;
        Ok(graph)
    }
}
