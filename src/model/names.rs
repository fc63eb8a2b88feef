//! Lists of names in messages.

/// Names that a message lists.
const MAX_NAMED: usize = 20;

/// The first names of a list, and how many more there are.
pub(super) fn list(names: &[String]) -> String {
    let shown = names[..names.len().min(MAX_NAMED)].join(", ");
    match names.len().saturating_sub(MAX_NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
