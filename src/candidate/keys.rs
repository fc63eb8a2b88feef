//! Untrusted keys, shortened for messages.

use std::fmt;

use super::cut;

/// The first few keys, each shortened, and the number of all.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys {
    shown: Vec<String>,
    count: u64,
}

impl Keys {
    const MOST: usize = 6;
    const LONGEST: usize = 40;

    pub(super) fn note(&mut self, key: &str) {
        if self.shown.len() < Self::MOST {
            self.shown.push(cut(key, Self::LONGEST));
        }
        self.count += 1;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl<'k> FromIterator<&'k str> for Keys {
    fn from_iter<I: IntoIterator<Item = &'k str>>(keys: I) -> Self {
        let mut noted = Self::default();
        keys.into_iter().for_each(|key| noted.note(key));
        noted
    }
}

impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        for (at, key) in self.shown.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{key:?}")?;
        }
        match self.count - self.shown.len() as u64 {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_keys_are_shown_and_none_of_them_whole() {
        let keys: Keys = ["a", "\n"].into_iter().collect();
        assert_eq!(keys.to_string(), r#""a", "\n""#);
        assert_eq!(Keys::default().to_string(), "none");
        let long = "ü".repeat(1 << 20);
        let many: Keys = std::iter::repeat_n(long.as_str(), 1000).collect();
        let said = many.to_string();
        assert!(said.ends_with(" and 994 more"), "{said}");
        assert!(said.chars().count() < 350, "{said}");
    }
}
