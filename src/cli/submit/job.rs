//! Jobs that come as text, one per line.

use std::io::Read;
use std::path::Path;

use crate::cli::Fault;
use crate::protocol::encoding::Encoding;

/// A job as it is published, with every digit of its text.
#[derive(Debug, PartialEq)]
pub(super) struct Submission {
    pub(super) id: String,
    pub(super) body: String,
}

pub(super) fn read_jobs(path: &Path) -> Result<Vec<Submission>, Fault> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|mut file| file.read_to_end(&mut bytes))
    };
    let named =
        |why: &dyn std::fmt::Display| Fault::data(format!("--jobs {}: {why}", path.display()));
    read.map_err(|e| named(&e))?;
    if matches!(bytes.as_slice(), [0xff, 0xfe, ..] | [0xfe, 0xff, ..]) {
        return Err(named(&"UTF-16 text, it must be UTF-8"));
    }
    let lines = String::from_utf8(bytes).map_err(|_| named(&"not UTF-8 text"))?;
    let lines = lines
        .lines()
        .map(|line| line.trim_start_matches('\u{feff}'));
    let lines = lines
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(at, line)| {
            read_job(line)
                .map_err(|e| Fault::data(format!("--jobs {}:{}: {e}", path.display(), at + 1)))
        })
        .collect()
}

/// A line is published unchanged, so that refusals can be tested; it only must have a name.
fn read_job(line: &str) -> Result<Submission, String> {
    let job = Encoding::Json.decode(line.as_bytes())?;
    match job["submission_id"].as_str() {
        Some(id) => Ok(Submission {
            id: id.to_owned(),
            body: line.to_owned(),
        }),
        None => Err("submission_id: missing, so its result could not be recognised".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs(bytes: &[u8]) -> Result<Vec<Submission>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, bytes).unwrap();
        read_jobs(file.path()).map_err(|fault| fault.message)
    }

    #[test]
    fn a_line_is_published_to_the_digit_whatever_marks_its_beginning() {
        let line = r#"{"submission_id": "a", "v": 1.0, "context": {"a": [1.10, 1e400]}}"#;
        let file = format!(
            "\u{feff}{line}\r\n\n\u{feff}{}\n",
            line.replace("\"a\",", "\"b\",")
        );
        let read = jobs(file.as_bytes()).unwrap();
        assert_eq!(read[0].body, line);
        let names: Vec<_> = read.iter().map(|job| job.id.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn a_file_that_is_no_list_of_jobs_is_named_with_its_line() {
        for (bytes, why) in [
            (&b"\xff\xfe{\0}\0"[..], ": UTF-16 text, it must be UTF-8"),
            (b"\xfe\xff\0{\0}", ": UTF-16 text, it must be UTF-8"),
            (b"{\"submission_id\": \"\xe9\"}", ": not UTF-8 text"),
            (b"\n{\"v\": 1}", ":2: submission_id: missing"),
            (b"[]", ":1: submission_id: missing"),
            (b"{\"submission_id\": null}", ":1: submission_id: missing"),
            (b"{", ":1: not JSON"),
        ] {
            let refused = jobs(bytes).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
    }
}
