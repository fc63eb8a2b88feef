//! Names that Kubernetes and docker set in every container for each service.

use std::ffi::OsStr;

/// Whether an orchestrator set this variable for a service whose name begins with `scorer`: `NAME_SERVICE_HOST`, `NAME_SERVICE_PORT`, `NAME_SERVICE_PORT_HTTP`,
/// `NAME_PORT=tcp://10.0.0.1:80`, `NAME_PORT_80_TCP` and `NAME_PORT_80_TCP_ADDR`.
pub(super) fn is_service_link(name: &str, value: &OsStr) -> bool {
    if name.ends_with("_SERVICE_HOST") || name.ends_with("_SERVICE_PORT") {
        return true;
    }
    let port_name = name.split_once("_SERVICE_PORT_");
    if port_name.is_some_and(|(_, port)| !port.is_empty()) || is_linked_port(name) {
        return true;
    }
    let value = value.to_str().and_then(|value| value.split_once("://"));
    name.ends_with("_PORT") && value.is_some_and(|(protocol, _)| is_transport(protocol))
}

/// `NAME_PORT_80_TCP`, or one of its parts.
fn is_linked_port(name: &str) -> bool {
    let mut said = ["_PROTO", "_PORT", "_ADDR"].iter();
    let port = said.find_map(|said| name.strip_suffix(said));
    let (port, transport) = port.unwrap_or(name).rsplit_once('_').unwrap_or_default();
    let (name, number) = port.rsplit_once('_').unwrap_or_default();
    let numbered = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    name.ends_with("_PORT") && numbered && is_transport(transport)
}

fn is_transport(protocol: &str) -> bool {
    let known = ["tcp", "udp", "sctp"];
    known
        .iter()
        .any(|known| protocol.eq_ignore_ascii_case(known))
}
