//! Valid names of jobs, models and workers.

/// Whether the text is 1 to 128 letters, digits and `others`.
fn is_id(text: &str, others: &[u8]) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || others.contains(&b);
    (1..=128).contains(&text.len()) && text.bytes().all(legal)
}

/// Whether the text is a valid `submission_id`.
pub fn is_submission_id(text: &str) -> bool {
    is_id(text, b"._:-")
}

/// Whether the text is a valid worker id.
pub fn is_worker_id(id: &str) -> bool {
    is_id(id, b"._-")
}

/// Whether the text is a valid model name.
pub fn is_model_name(name: &str) -> bool {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=64).contains(&name.len())
        && name.bytes().next().is_some_and(legal)
        && name.bytes().all(|b| legal(b) || b == b'_' || b == b'-')
}

/// Whether the text is a SHA-256 in lower-case hex, as in packages and manifests.
pub fn is_digest(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
