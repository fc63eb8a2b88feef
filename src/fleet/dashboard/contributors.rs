//! Who sends what: results counted by one key of the jobs' `context`. The values are texts of strangers:
//! they are shown, bounded in number and length, and nothing else.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::copies::{Copies, CopyOf};
use super::text::cut;
use super::verdict::{Class, Verdict};
use crate::protocol::context::Context;
use crate::protocol::job::Kind;
use crate::protocol::result::{Body, ResultMessage};

/// Contributors with a row of their own.
const MOST: usize = 1000;
/// Bytes of a name; who has the same beginning has the same row.
const NAME: usize = 128;

/// Rows by the value of a key.
#[derive(Debug)]
pub(super) struct Contributors {
    key: String,
    rows: BTreeMap<String, Row>,
    /// Everybody who came when the table was full.
    others: Row,
    /// Jobs that do not say who sent them.
    nobody: Row,
    copies: Copies,
}

#[derive(Debug, Clone, Default, Serialize)]
struct Row {
    submissions: u64,
    better: u64,
    worse: u64,
    unclear: u64,
    failed: u64,
    /// By code.
    refused: BTreeMap<&'static str, u64>,
    copies: u64,
    /// Whose candidate the last copy resembled.
    copied_from: Option<CopyOf>,
}

/// All rows.
#[derive(Debug, Serialize)]
pub(super) struct Table<'a> {
    key: &'a str,
    since_ms: Option<u64>,
    rows: Vec<Named<'a>>,
}

#[derive(Debug, Serialize)]
struct Named<'a> {
    name: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    others: bool,
    #[serde(flatten)]
    row: &'a Row,
}

impl Contributors {
    pub(super) fn new(key: String) -> Self {
        Self {
            key,
            rows: BTreeMap::new(),
            others: Row::default(),
            nobody: Row::default(),
            copies: Copies::default(),
        }
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// Counts a result that was not seen before.
    pub(super) fn judge(&mut self, result: &ResultMessage, verdict: &Verdict) {
        match result.kind {
            Kind::Score => {}
            Kind::Validate | Kind::Merge => return,
        }
        let name = result.context.as_ref().and_then(|c| text(c, &self.key));
        let copied = match (&result.body, &name) {
            (Body::Score(body), Some(name)) => self.copies.find(name, &result.submission_id, body),
            (Body::Score(_) | Body::Loss(_) | Body::Merge(_) | Body::Error { .. }, _) => None,
        };
        self.row(name).count(verdict, copied);
    }

    fn row(&mut self, name: Option<String>) -> &mut Row {
        let full = self.rows.len() >= MOST;
        match name {
            None => &mut self.nobody,
            Some(name) if full && !self.rows.contains_key(&name) => &mut self.others,
            Some(name) => self.rows.entry(name).or_default(),
        }
    }

    /// The rows by name; what has no name comes last.
    pub(super) fn table(&self, since_ms: Option<u64>) -> Table<'_> {
        let named = self.rows.iter().map(|(name, row)| Named {
            name: name.clone(),
            others: false,
            row,
        });
        let nameless = [
            ("others".to_owned(), &self.others),
            (format!("without {}", self.key), &self.nobody),
        ];
        let nameless = nameless.into_iter().filter(|(_, row)| row.submissions > 0);
        let nameless = nameless.map(|(name, row)| Named {
            name,
            others: true,
            row,
        });
        Table {
            key: &self.key,
            since_ms,
            rows: named.chain(nameless).collect(),
        }
    }
}

impl Row {
    fn count(&mut self, verdict: &Verdict, copied: Option<CopyOf>) {
        self.submissions += 1;
        match verdict.class {
            Class::Better => self.better += 1,
            Class::Worse => self.worse += 1,
            Class::Unclear | Class::Validated | Class::Merged => self.unclear += 1,
            Class::Failed => self.failed += 1,
            Class::Rejected => *self.refused.entry(verdict.verdict).or_default() += 1,
        }
        if let Some(copied) = copied {
            self.copies += 1;
            self.copied_from = Some(copied);
        }
    }
}

/// The value of a key, as text.
fn text(context: &Context, key: &str) -> Option<String> {
    let value = serde_json::to_value(context).ok()?;
    match value.get(key)? {
        Value::Null => None,
        Value::String(text) => Some(beginning(text)),
        other @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            Some(beginning(&other.to_string()))
        }
    }
}

fn beginning(name: &str) -> String {
    match cut(name, NAME) {
        part if part.len() < name.len() => format!("{part}…"),
        all => all.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::dashboard::made::{rejected, scored};
    use serde_json::json;

    #[test]
    fn names_that_look_the_same_have_one_row() {
        let mut table = Contributors::new("miner_id".into());
        for end in ["a", "b"] {
            let name = format!("{}{end}", "n".repeat(4000));
            let seen = scored(1, json!({"context": {"miner_id": name}}));
            table.judge(&seen.result, &Verdict::of(&seen));
        }
        let told = serde_json::to_value(table.table(None)).unwrap();
        let rows = told["rows"].as_array().unwrap();
        assert_eq!((rows.len(), &rows[0]["submissions"]), (1, &json!(2)));
    }

    #[test]
    fn results_are_counted_by_who_sent_them_whatever_form_the_name_has() {
        let mut table = Contributors::new("miner_id".into());
        let hostile = "<b>".repeat(100);
        for (context, ci95) in [
            (json!({"miner_id": "a"}), json!([0.1, 0.2])),
            (json!({"miner_id": "a"}), json!([-0.2, -0.1])),
            (json!({"miner_id": "a"}), json!([-0.1, 0.1])),
            (json!({"miner_id": 7}), json!([0.1, 0.2])),
            (json!({"miner_id": null}), json!([0.1, 0.2])),
            (json!({"other": 1}), json!([0.1, 0.2])),
            (json!({"miner_id": hostile}), json!(null)),
        ] {
            let seen = scored(1, json!({"context": context, "ci95": ci95}));
            table.judge(&seen.result, &Verdict::of(&seen));
        }
        let refused = rejected(1, json!({"context": {"miner_id": "a"}}));
        let verdict = Verdict::of(&refused);
        table.judge(&refused.result, &verdict);
        let told = serde_json::to_value(table.table(Some(5))).unwrap();
        let rows = told["rows"].as_array().unwrap();
        let names: Vec<_> = rows
            .iter()
            .map(|row| row["name"].as_str().unwrap())
            .collect();
        let shown = format!("{}…", &hostile[..NAME]);
        assert_eq!(names, ["7", &shown, "a", "without miner_id"]);
        let counts = ["submissions", "better", "worse", "unclear"];
        assert_eq!(
            counts.map(|name| rows[2][name].as_u64().unwrap()),
            [4, 1, 1, 1]
        );
        assert_eq!(rows[2]["refused"], json!({verdict.verdict: 1}));
        assert_eq!(
            (&rows[3]["submissions"], &rows[3]["others"]),
            (&json!(2), &json!(true))
        );
    }
}
