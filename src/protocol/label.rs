//! The content type of a message, and the error for a sender whose body is something else.

use crate::protocol::encoding::Encoding;
use crate::protocol::json;

/// What a message says of its body.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Label {
    /// AMQP's `content_type`.
    pub content_type: Option<String>,
    /// AMQP's `content_encoding`.
    pub content_encoding: Option<String>,
    /// The header `compression`, by which kombu and Celery say how a body is compressed.
    pub compression: Option<String>,
}

impl From<Encoding> for Label {
    fn from(encoding: Encoding) -> Self {
        Self {
            content_type: Some(encoding.content_type().into()),
            ..Self::default()
        }
    }
}

/// What `content_encoding` says where a body is not encoded any further; some clients put the
/// characters' encoding there.
const PLAIN: [&str; 9] = [
    "", "identity", "none", "binary", "utf-8", "utf8", "us-ascii", "ascii", "8bit",
];

/// How compressed bytes begin.
const COMPRESSED: [(&[u8], &str); 9] = [
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x78\x01", "zlib"),
    (b"\x78\x5e", "zlib"),
    (b"\x78\x9c", "zlib"),
    (b"\x78\xda", "zlib"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x04\x22\x4d\x18", "lz4"),
];

impl Label {
    /// How the body is encoded.
    pub fn encoding(&self) -> Encoding {
        Encoding::from_content_type(self.content_type.as_deref())
    }

    /// Decodes a body as [`Encoding::decode`] does.
    ///
    /// # Errors
    /// A sentence for the sender that says what is at hand, as far as that can be seen.
    pub fn decode(&self, body: &[u8]) -> Result<rmpv::Value, String> {
        let decoded = self.encoding().decode(body);
        decoded.map_err(|problem| match self.at_hand(body) {
            Some(found) => format!("{found} ({problem})"),
            None => problem,
        })
    }

    fn at_hand(&self, body: &[u8]) -> Option<String> {
        let coded = |said: &&String| {
            let said = said.trim();
            !PLAIN.iter().any(|plain| said.eq_ignore_ascii_case(plain))
        };
        if let Some(coding) = self.content_encoding.as_ref().filter(coded) {
            return Some(format!(
                "content_encoding {coding} is not read, send the body as it is"
            ));
        }
        if let Some(coding) = self.compression.as_ref().filter(coded) {
            return Some(format!(
                "the header compression ({coding}) is not read, send the body uncompressed"
            ));
        }
        let mut known = COMPRESSED.iter();
        if let Some((_, name)) = known.find(|(magic, _)| body.starts_with(magic)) {
            return Some(format!("looks like {name}, a compressed body is not read"));
        }
        if let Some(name) = other_unicode(body) {
            return Some(format!("looks like {name} text, JSON is read as UTF-8"));
        }
        let said = match &self.content_type {
            None => "content_type is missing".to_owned(),
            Some(said) => format!("content_type is {said}"),
        };
        match self.encoding() {
            Encoding::MessagePack if looks_like_json(body) => Some(format!(
                "looks like JSON; {said}, application/json is needed"
            )),
            Encoding::Json if Encoding::MessagePack.decode(body).is_ok_and(|v| v.is_map()) => Some(
                format!("looks like MessagePack; {said}, application/msgpack is needed"),
            ),
            Encoding::MessagePack if !self.names_messagepack() => Some(format!(
                "{said}, application/msgpack or application/json is needed"
            )),
            Encoding::MessagePack | Encoding::Json => None,
        }
    }

    /// Nothing named is MessagePack, too.
    fn names_messagepack(&self) -> bool {
        self.content_type.as_deref().is_none_or(|said| {
            let said = said.to_ascii_lowercase();
            said.contains("msgpack") || said.contains("messagepack")
        })
    }
}

/// A map or a list of JSON: as MessagePack, its first byte would be a number.
fn looks_like_json(body: &[u8]) -> bool {
    let text = json::unmarked(body).trim_ascii();
    matches!(text, [b'{', .., b'}'] | [b'[', .., b']'])
}

fn other_unicode(body: &[u8]) -> Option<&'static str> {
    match body {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => Some("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'{', 0, ..] | [0, b'{', ..] => Some("UTF-16"),
        [..] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(content_type: Option<&str>) -> Label {
        Label {
            content_type: content_type.map(str::to_owned),
            ..Label::default()
        }
    }

    fn refused(label: &Label, body: &[u8]) -> String {
        label.decode(body).unwrap_err()
    }

    #[test]
    fn json_has_a_family_of_names_and_anything_else_is_messagepack() {
        for name in [
            "application/json",
            "Application/JSON",
            "application/json;charset=utf-8",
            " application/json ; charset=\"UTF-8\"",
            "text/json",
            "TEXT/JSON; charset=utf-8",
            "application/vnd.acme+json",
            "application/cloudevents+json; charset=UTF-8",
            "application/problem+JSON",
        ] {
            assert_eq!(
                Encoding::from_content_type(Some(name)),
                Encoding::Json,
                "{name}"
            );
        }
        for name in [
            "application/msgpack",
            "application/x-msgpack",
            "application/vnd.msgpack",
            "application/vnd.acme+msgpack",
            "application/octet-stream",
            "text/plain",
            "application/jsonp",
            "application/json+msgpack",
            "+json",
            "json",
            "",
        ] {
            let encoding = Encoding::from_content_type(Some(name));
            assert_eq!(encoding, Encoding::MessagePack, "{name}");
        }
        assert_eq!(Encoding::from_content_type(None), Encoding::MessagePack);
    }

    #[test]
    fn json_under_another_name_is_named_with_the_name() {
        for body in ["{\"v\":1}", " \n[1]", "\u{feff}{\"v\":1}\r\n", "{}"] {
            let why = refused(&label(None), body.as_bytes());
            let expected = "looks like JSON; content_type is missing, application/json is needed";
            assert!(why.starts_with(expected), "{why}");
            let why = refused(&label(Some("text/plain")), body.as_bytes());
            let expected =
                "looks like JSON; content_type is text/plain, application/json is needed";
            assert!(why.starts_with(expected), "{why}");
        }
    }

    #[test]
    fn messagepack_under_the_name_of_json_is_named() {
        let why = refused(&label(Some("text/json")), b"\x81\xa1v\x01");
        let expected =
            "looks like MessagePack; content_type is text/json, application/msgpack is needed";
        assert!(why.starts_with(expected), "{why}");
    }

    #[test]
    fn what_is_neither_is_named_by_its_content_type() {
        let why = refused(
            &label(Some("application/x-python-serialize")),
            b"\x80\x02}q\0.",
        );
        assert!(
            why.starts_with("content_type is application/x-python-serialize, "),
            "{why}"
        );
        let why = refused(&label(Some("application/msgpack")), b"\x81\xa1v");
        assert!(why.starts_with("not MessagePack: "), "{why}");
        let why = refused(&label(Some("application/json")), b"{\"v\":");
        assert!(why.starts_with("not JSON: "), "{why}");
    }

    #[test]
    fn a_coded_body_is_named_by_what_is_said_of_it_or_by_how_it_begins() {
        let gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xabV*S\xb22\xac\x05\0";
        for content_type in [None, Some("application/json"), Some("application/msgpack")] {
            let said = Label {
                content_encoding: Some("gzip".into()),
                ..label(content_type)
            };
            let why = refused(&said, gzip);
            assert!(
                why.starts_with("content_encoding gzip is not read"),
                "{why}"
            );
            let said = Label {
                content_encoding: Some("utf-8".into()),
                compression: Some("application/x-gzip".into()),
                ..label(content_type)
            };
            let why = refused(&said, b"\x78\x9c\xabV*S\xb22\xac\x05\0");
            assert!(
                why.starts_with("the header compression (application/x-gzip) is not read"),
                "{why}"
            );
            let why = refused(&label(content_type), gzip);
            assert!(why.starts_with("looks like gzip, "), "{why}");
            let why = refused(&label(content_type), b"\x28\xb5\x2f\xfd\x20\x02\x11\0\0{}");
            assert!(why.starts_with("looks like zstd, "), "{why}");
        }
    }

    #[test]
    fn text_that_is_not_utf_8_is_named() {
        for (body, name) in [
            (&b"\xff\xfe{\0}\0"[..], "UTF-16"),
            (b"\xfe\xff\0{\0}", "UTF-16"),
            (b"{\0}\0", "UTF-16"),
            (b"\xff\xfe\0\0{\0\0\0", "UTF-32"),
        ] {
            for content_type in [None, Some("application/json")] {
                let why = refused(&label(content_type), body);
                assert!(why.starts_with(&format!("looks like {name} text")), "{why}");
            }
        }
    }

    #[test]
    fn what_is_said_of_the_characters_is_no_coding() {
        for said in ["utf-8", "UTF-8", "binary", "identity", ""] {
            let said = Label {
                content_encoding: Some(said.into()),
                ..Encoding::Json.into()
            };
            assert!(said.decode(b"\xef\xbb\xbf{\"v\":1}").is_ok());
        }
    }
}
