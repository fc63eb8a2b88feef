//! The layers of the configuration and how they are merged. Every value is checked in its own layer, so
//! that all problems are found and each names its source.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use toml::{Table, Value};

use super::keys::{Type, check, is_section, read, similar, type_of};
use super::problem::{Place, Problem};
use super::service_links::is_service_link;

const DEFAULTS: &str = include_str!("../config.default.toml");
pub(super) const ENVIRONMENT_PREFIX: &str = "SCORER_";

/// The layers above the defaults.
#[derive(Debug, Default)]
pub struct Layers<'a> {
    /// `--config`.
    pub file: Option<&'a Path>,
    /// The environment; only `SCORER_` names are read, and only they must be UTF-8.
    pub environment: Vec<(OsString, OsString)>,
    /// `--set KEY=VALUE`.
    pub set: &'a [String],
}

/// The merged layers. A value with a problem is left out in favour of the one below, so that the table
/// always fits the typed configuration and can be checked further.
#[derive(Debug, Default)]
pub(super) struct Merged {
    pub(super) table: Table,
    pub(super) problems: Vec<Problem>,
    /// Names of the environment that an orchestrator made.
    pub(super) passed_over: Vec<String>,
}

impl Merged {
    pub(super) fn of(layers: &Layers<'_>) -> Self {
        let mut merged = Self::default();
        merged.document(DEFAULTS, Place::Defaults);
        if let Some(path) = layers.file {
            merged.file(path);
        }
        merged.environment(&layers.environment);
        merged.set(layers.set);
        merged
    }

    fn file(&mut self, path: &Path) {
        match std::fs::read_to_string(path) {
            Ok(text) => self.document(&text, Place::File(path)),
            Err(e) => self.refuse(
                &Place::File(path).to_string(),
                format!("cannot be read: {e}"),
            ),
        }
    }

    fn document(&mut self, text: &str, place: Place<'_>) {
        match toml::from_str::<Table>(text) {
            Ok(table) => self.overlay("", table, place),
            // Not the error's own text: it quotes the line, and a line may hold a password.
            Err(e) => {
                let before = e.span().and_then(|span| text.get(..span.start));
                let line = before.map_or(1, |before| before.matches('\n').count() + 1);
                let message = e.message().replace('\n', ", ");
                self.refuse(&place.to_string(), format!("line {line}: {message}"));
            }
        }
    }

    fn overlay(&mut self, section: &str, table: Table, place: Place<'_>) {
        for (name, value) in table {
            let key = match section {
                "" => name,
                _ => format!("{section}.{name}"),
            };
            match (type_of(&key), value) {
                (Some(kind), value) => self.put(&key, kind, value, place),
                // Keys of an unknown section are named one by one, each with similar keys.
                (None, Value::Table(inner)) if is_section(&key) || !inner.is_empty() => {
                    self.overlay(&key, inner, place);
                }
                (None, value) if is_section(&key) => {
                    let what = value.type_str();
                    self.refuse(&key, format!("is a section, not {what} ({place})"));
                }
                (None, _) => self.refuse_unknown(&key, place),
            }
        }
    }

    fn environment(&mut self, environment: &[(OsString, OsString)]) {
        for (name, text) in environment {
            // Other programs' variables are ignored, UTF-8 or not.
            if !is_ours(name) {
                continue;
            }
            let shown = name.to_string_lossy();
            let place = Place::Environment(&shown);
            let bare = shown.strip_prefix(ENVIRONMENT_PREFIX).unwrap_or_default();
            let key = bare.to_ascii_lowercase().replace("__", ".");
            if type_of(&key).is_none() && is_service_link(&shown, text) {
                self.passed_over.push(shown.into_owned());
                continue;
            }
            match text.to_str() {
                Some(text) => self.put_text(&key, text, place),
                None => self.refuse(&key, format!("is not UTF-8 ({place})")),
            }
        }
    }

    fn set(&mut self, set: &[String]) {
        for pair in set {
            match pair.split_once('=').map(|(key, text)| (key.trim(), text)) {
                None | Some(("", _)) => self.refuse(pair, "must be KEY=VALUE (--set)".into()),
                Some((key, text)) => self.put_text(key, text, Place::Set),
            }
        }
    }

    fn put_text(&mut self, key: &str, text: &str, place: Place<'_>) {
        match type_of(key).map(|kind| (kind, read(kind, text))) {
            None => self.refuse_unknown(key, place),
            Some((kind, Ok(value))) => self.put(key, kind, value, place),
            Some((_, Err(problem))) => self.refuse(key, format!("{problem} ({place})")),
        }
    }

    fn put(&mut self, key: &str, kind: Type, value: Value, place: Place<'_>) {
        match check(kind, &value) {
            Ok(()) => insert(&mut self.table, key, value),
            Err(problem) => self.refuse(key, format!("{problem} ({place})")),
        }
    }

    fn refuse(&mut self, key: &str, text: String) {
        let key = key.to_owned();
        self.problems.push(Problem { key, text });
    }

    fn refuse_unknown(&mut self, key: &str, place: Place<'_>) {
        let similar: Vec<String> = similar(key)
            .into_iter()
            .map(|name| place.spelling(name))
            .collect();
        let hint = match similar.as_slice() {
            [] => String::new(),
            names => format!("; did you mean {}?", names.join(" or ")),
        };
        self.refuse(key, format!("unknown key{hint} ({place})"));
    }
}

fn is_ours(name: &OsStr) -> bool {
    let prefix = ENVIRONMENT_PREFIX.as_bytes();
    name.as_encoded_bytes().starts_with(prefix)
}

fn insert(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => drop(table.insert(key.to_owned(), value)),
        Some((section, rest)) => {
            let inner = table.entry(section).or_insert_with(|| Table::new().into());
            if let Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::config::keys::KEYS;
    use crate::config::units::format_duration;
    use std::time::Duration;

    fn merged(file: &str, environment: &[(&str, &str)], set: &[&str]) -> Merged {
        let mut merged = Merged::default();
        merged.document(DEFAULTS, Place::Defaults);
        merged.document(file, Place::File(Path::new("f.toml")));
        let environment = environment.iter().map(|(k, v)| (k.into(), v.into()));
        merged.environment(&environment.collect::<Vec<_>>());
        let set = set.iter().map(|s| (*s).to_owned());
        merged.set(&set.collect::<Vec<_>>());
        merged
    }

    /// The problems as they are shown.
    fn problems(file: &str, environment: &[(&str, &str)], set: &[&str]) -> Vec<String> {
        let merged = merged(file, environment, set);
        merged.problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_known_key_is_documented_in_the_defaults() {
        for (key, _) in KEYS {
            let last = key.rsplit('.').next().unwrap();
            assert!(
                DEFAULTS.contains(last),
                "{key} is missing in config.default.toml"
            );
        }
        assert_eq!(merged("", &[], &[]).problems, []);
    }

    #[test]
    fn whatever_a_key_may_hold_fits_its_field() {
        for (key, kind) in KEYS {
            let extremes = match kind {
                Type::Text => vec!["x".into()],
                Type::Choice(words) => words.iter().map(|w| (*w).into()).collect(),
                Type::Integer(least, most) => vec![least.to_string(), most.to_string()],
                Type::Boolean => vec!["true".into()],
                Type::Share => vec!["0".into(), "0.25".into(), "1".into()],
                Type::Duration(least, most) => {
                    [*least, *most].into_iter().map(format_duration).collect()
                }
                Type::Size => vec!["0".into(), "18446744073709551615".into()],
                Type::Urls => vec!["x".into(), "[\"x\", \"y\"]".into()],
                Type::TextList => vec!["[]".into(), "[\"x\"]".into()],
                Type::DurationList(least, most) => {
                    let (least, most) = (format_duration(*least), format_duration(*most));
                    vec!["[]".into(), format!("[\"{least}\", \"{most}\"]")]
                }
            };
            for text in extremes {
                let merged = merged("", &[], &[&format!("{key}={text}")]);
                assert_eq!(merged.problems, [], "{key}={text}");
                let typed = Config::typed(merged.table);
                assert_eq!(typed.err(), None, "{key}={text}");
            }
        }
    }

    #[test]
    fn the_later_layer_wins_and_values_are_read_for_the_keys_type() {
        let merged = merged(
            "amqp.prefetch = 7\nredis.namespace = \"file\"\n[candidates]\nmax_bytes = 5",
            &[
                ("SCORER_WORKER__ID", "7"),
                ("SCORER_AMQP__PREFETCH", " 9 "),
                ("SCORER_CANDIDATES__MAX_INLINE_BYTES", "1024"),
                ("PATH", "/bin"),
            ],
            &[
                "amqp.prefetch=3",
                " worker.score_timeout = 5s",
                "candidates.allow=[\"file:///a=b\"]",
                "amqp.retry_delays=[\"100ms\"]",
            ],
        );
        assert_eq!(merged.problems, []);
        let config = Config::typed(merged.table).unwrap();
        assert_eq!(config.worker_id(), "7");
        assert_eq!(config.amqp.prefetch, 3);
        assert_eq!(config.amqp.namespace, "scorer");
        assert_eq!(config.redis.namespace, "file");
        assert_eq!(config.worker.score_timeout, Duration::from_secs(5));
        assert_eq!(config.candidates.allow, ["file:///a=b"]);
        assert_eq!(config.amqp.retry_delays, [Duration::from_millis(100)]);
        assert_eq!(config.candidates.max_inline_bytes, 1024);
        assert_eq!(config.candidates.max_bytes, 5);
    }

    #[test]
    fn a_value_out_of_bounds_or_of_another_type_is_refused() {
        for (set, expected) in [
            ("engine.threads=many", "whole number"),
            ("engine.threads=-1", "must be from 0 to"),
            ("engine.threads=4294967296", "must be from 0 to"),
            ("engine.device_id=99999999999999999999", "whole number"),
            ("engine.micro_batch=0", "must be from 1"),
            ("engine.micro_batch=100000000", "must be from 1"),
            ("engine.tf32=yes", "true nor false"),
            ("worker.drain_timeout=-1s", "not a duration"),
            ("worker.drain_timeout=8761h", "must be from 0ms to 8760h"),
            ("worker.drain_timeout=18446744073709551615h", "too long"),
            ("worker.score_timeout=0s", "must be from 1ms"),
            (
                "worker.finish_stopped=1.5",
                "must be from 0 to 1, it is 1.5",
            ),
            (
                "worker.finish_stopped=nan",
                "must be from 0 to 1, it is nan",
            ),
            ("worker.finish_stopped=few", "is not a number"),
            ("candidates.fetch_timeout=0s", "must be from 1ms"),
            ("amqp.heartbeat=500ms", "must be from 1s to 18h"),
            ("amqp.retry_delays=[\"5s\", \"0s\"]", "item 2: must be"),
            ("amqp.retry_delays=[\"1194h\"]", "item 1: must be"),
            ("amqp.retry_delays=[5]", "item 1: must be a duration"),
            ("amqp.retry_delays=5s", "TOML array"),
            ("candidates.allow=[1]", "item 1: must be text"),
            ("candidates.allow=[\"\"]", "item 1: must not be empty"),
            ("candidates.allow=[]\nx=1", "TOML array"),
            ("candidates.max_bytes=-1", "not a size"),
            ("candidates.max_bytes=99999999999GiB", "too large"),
            ("amqp.url=", "must not be empty"),
            (
                "redis.mode=replicated",
                "must be single or sentinel or cluster",
            ),
            ("amqp.url=[]", "must name at least one URL"),
            ("amqp.url=[\"amqp://h\", \"\"]", "item 2: must not be empty"),
            ("amqp.url=[\"amqp://h\", 7]", "item 2: must be text"),
        ] {
            let found = problems("", &[], &[set]);
            let key = set.split('=').next().unwrap();
            let [problem] = found.as_slice() else {
                panic!("{set}: {found:?}")
            };
            assert!(problem.starts_with(&format!("{key}: ")), "{problem}");
            assert!(
                problem.contains(expected) && problem.ends_with(" (--set)"),
                "{problem}"
            );
        }
    }

    #[test]
    fn every_slip_of_a_file_is_named() {
        let file = "amqp = 5\nworker.id = 7\nmodel.name = {}\n[telemetry.log]\nx = 1\n[candidate]\n\
                    [rediss]\nurl = \"x\"\n[candidates]\nmax_bytes = -1\nallow_private = 1979-05-27";
        let mut found = problems(file, &[], &[]);
        found.sort();
        let place = "(--config f.toml)";
        assert_eq!(
            found,
            [
                format!("amqp: is a section, not integer {place}"),
                format!("candidate: unknown key {place}"),
                format!("candidates.allow_private: must be true or false, not datetime {place}"),
                format!("candidates.max_bytes: must not be negative, it is -1 {place}"),
                format!("model.name: must be text, not table {place}"),
                format!("rediss.url: unknown key; did you mean amqp.url or redis.url? {place}"),
                format!("telemetry.log: must be text, not table {place}"),
                format!("worker.id: must be text, not integer {place}"),
            ]
        );
    }

    #[test]
    fn a_file_that_is_not_toml_is_named_without_quoting_it() {
        let found = problems("[amqp]\nurl = \"amqp://u:hunter2@h\n", &[], &[]);
        let [problem] = found.as_slice() else {
            panic!("{found:?}")
        };
        assert!(
            problem.starts_with("--config f.toml: line 2: "),
            "{problem}"
        );
        assert!(!problem.contains("hunter2"), "{problem}");
    }

    #[test]
    fn a_slip_of_a_name_is_answered_with_the_right_one() {
        for (name, expected) in [
            ("SCORER_AMQP_URL", "SCORER_AMQP__URL?"),
            (
                "SCORER_CANDIDATES_MAX_BYTES",
                "SCORER_CANDIDATES__MAX_BYTES?",
            ),
            ("SCORER_AMQP_TLS_CA", "SCORER_AMQP__TLS__CA?"),
            (
                "SCORER_NAMESPACE",
                "SCORER_AMQP__NAMESPACE or SCORER_REDIS__NAMESPACE?",
            ),
        ] {
            let found = problems("", &[(name, "1")], &[]);
            let expected = format!("did you mean {expected} ({name})");
            assert!(
                found.len() == 1 && found[0].contains(&expected),
                "{found:?}"
            );
        }
        for (key, expected) in [
            ("Worker.Id", "worker.id?"),
            ("amqp_url", "amqp.url?"),
            ("modle.dir", "model.dir?"),
            ("model.nmae", "model.name?"),
            ("engine.thread", "engine.threads?"),
            ("engine.provider", "engine.execution_provider?"),
            ("candidates.max_byte", "candidates.max_bytes?"),
        ] {
            let found = problems("", &[], &[&format!("{key}=7")]);
            let expected = format!("{key}: unknown key; did you mean {expected} (--set)");
            assert_eq!(found, [expected]);
            // The environment is told as much; its names are in capitals anyway.
            if key.contains(char::is_uppercase) {
                continue;
            }
            let name = format!("SCORER_{}", key.replace('.', "__").to_ascii_uppercase());
            let found = problems("", &[(&name, "7")], &[]);
            assert!(
                found.len() == 1 && found[0].contains("; did you mean "),
                "{found:?}"
            );
        }
        let found = problems("", &[], &["nothing.like_it=7"]);
        assert_eq!(found, ["nothing.like_it: unknown key (--set)"]);
    }

    #[test]
    fn what_an_orchestrator_sets_for_a_service_is_passed_over_with_a_note() {
        let links = [
            ("SCORER_SERVICE_HOST", "10.96.0.10"),
            ("SCORER_SERVICE_PORT", "80"),
            ("SCORER_SERVICE_PORT_HTTP_METRICS", "80"),
            ("SCORER_PORT", "tcp://10.96.0.10:80"),
            ("SCORER_PORT_80_TCP", "tcp://10.96.0.10:80"),
            ("SCORER_PORT_80_TCP_PROTO", "tcp"),
            ("SCORER_PORT_80_TCP_PORT", "80"),
            ("SCORER_PORT_80_TCP_ADDR", "10.96.0.10"),
            ("SCORER_AMQP_SERVICE_HOST", "10.96.0.11"),
            ("SCORER_AMQP_PORT", "udp://10.96.0.11:5672"),
            ("SCORER_A__B_V2_PORT_53_UDP_ADDR", "10.96.0.12"),
            ("SCORER_PORT_9_SCTP", "sctp://10.96.0.12:9"),
        ];
        let merged = merged("", &links, &[]);
        assert_eq!(merged.problems, []);
        assert_eq!(merged.passed_over, links.map(|(name, _)| name));
    }

    #[test]
    fn what_only_looks_like_an_orchestrators_name_stays_an_error() {
        for (name, value) in [
            ("SCORER_PORT", "80"),
            ("SCORER_PORT", "http://10.96.0.10:80"),
            ("SCORER_AMQP__PORT", "5672"),
            ("SCORER_SERVICE_HOSTS", "x"),
            ("SCORER_SERVICE_PORT_", "x"),
            ("SCORER_SERVICE", "x"),
            ("SCORER_PORT_TCP", "x"),
            ("SCORER_PORT_80", "x"),
            ("SCORER_PORT_HTTP_TCP", "x"),
            ("SCORER_PORT_80_HTTP", "x"),
            ("SCORER_PORT_80_TCP_NAME", "x"),
            ("SCORER_NAME", "/web/scorer"),
            ("SCORER_ENV_PATH", "/bin"),
        ] {
            let found = problems("", &[(name, value)], &[]);
            let [problem] = found.as_slice() else {
                panic!("{name}: {found:?}")
            };
            assert!(problem.contains("unknown key"), "{problem}");
        }
    }

    #[test]
    fn a_pair_without_a_key_or_a_value_is_refused() {
        let found = problems("", &[], &["worker.id", "=7", ""]);
        assert_eq!(
            found,
            [
                "worker.id: must be KEY=VALUE (--set)",
                "=7: must be KEY=VALUE (--set)",
                ": must be KEY=VALUE (--set)"
            ]
        );
    }

    #[test]
    fn an_environment_that_is_not_utf_8_is_ours_only_with_our_prefix() {
        use std::os::unix::ffi::OsStringExt;
        let os = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        let mut merged = Merged::default();
        merged.environment(&[
            (os(b"LATIN"), os(b"caf\xe9")),
            (os(b"CAF\xc9"), os(b"x")),
            (os(b"SCORER_WORKER__ID"), os(b"caf\xe9")),
            (os(b"SCORER_CAF\xc9"), os(b"x")),
        ]);
        let found: Vec<String> = merged.problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "worker.id: is not UTF-8 (SCORER_WORKER__ID)",
                "caf\u{fffd}: unknown key (SCORER_CAF\u{fffd})"
            ]
        );
    }
}
