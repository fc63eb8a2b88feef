//! Names that differ only by a common prefix: wrapping a model in a module, compiling it or
//! training it in parallel prefixes the name of every tensor.

use std::borrow::Cow;

/// The prefixes of known wrappers: compilation, parallel training, adapters.
const WRAPPERS: [&str; 3] = ["_orig_mod.", "module.", "base_model.model."];
/// The most parts of a prefix. Names are untrusted, and each prefix costs a pass over all of them.
const MAX_PARTS: usize = 16;

/// A replacement of the common prefix of names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Renaming {
    /// The prefix that is removed.
    taken: String,
    /// The prefix that is put in its place.
    put: String,
}

impl Renaming {
    /// All renamings that remove a common prefix of the names, or prepend one of the other side's;
    /// the identity first. A prefix is replaced by another only if it is that of a known wrapper:
    /// `encoder.weight` does not stand for `decoder.weight`.
    pub fn all<'n>(names: impl IntoIterator<Item = &'n str>, others: &[&str]) -> Vec<Self> {
        let own = prefixes(names);
        let pairs = own.iter().flat_map(|taken| {
            let sound = |put: &&&str| put.is_empty() || taken.is_empty() || is_wrapper(taken);
            others.iter().filter(sound).map(|put| Self {
                taken: (*taken).to_owned(),
                put: (*put).to_owned(),
            })
        });
        let changing = pairs.filter(|renaming| renaming.taken != renaming.put);
        std::iter::once(Self::default()).chain(changing).collect()
    }

    /// The only renaming that makes every name known; the identity if all of them already are.
    /// `others` are the [`prefixes`] of the known names.
    pub fn find<'n>(
        names: impl Iterator<Item = &'n str> + Clone,
        others: &[&str],
        known: impl Fn(&str) -> bool,
    ) -> Option<Self> {
        let fits = |renaming: &Self| {
            let mut renamed = names.clone().map(|name| renaming.apply(name));
            renamed.all(|name| name.is_some_and(|name| known(&name)))
        };
        let unchanged = Self::default();
        if fits(&unchanged) {
            return Some(unchanged);
        }
        let all = Self::all(names.clone(), others);
        let mut fitting = all.into_iter().filter(fits);
        let found = fitting.next()?;
        // Renamings that agree on one name agree on all, since all share the prefix.
        let first = names.clone().next()?;
        let same = |other: Self| other.apply(first) == found.apply(first);
        fitting.all(same).then_some(found)
    }

    /// The name on the other side; none if the name lacks the prefix.
    pub fn apply<'n>(&self, name: &'n str) -> Option<Cow<'n, str>> {
        let rest = name.strip_prefix(&self.taken)?;
        Some(match self.put.as_str() {
            "" => Cow::Borrowed(rest),
            put => Cow::Owned(format!("{put}{rest}")),
        })
    }
}

/// The common prefixes of the names, in whole parts: the empty one, the first part, the first two.
pub fn prefixes<'n>(names: impl IntoIterator<Item = &'n str>) -> Vec<&'n str> {
    let common = names.into_iter().reduce(|common, name| {
        let pairs = common.bytes().zip(name.bytes());
        let same = pairs.take_while(|(a, b)| a == b).count();
        // Not inside a character.
        &common[..common.floor_char_boundary(same)]
    });
    let common = common.unwrap_or_default();
    let ends = common.match_indices(['.', '/']).map(|(at, _)| at + 1);
    let ends = std::iter::once(0).chain(ends.take(MAX_PARTS));
    ends.map(|end| &common[..end]).collect()
}

/// Whether the prefix consists of known wrappers.
pub(super) fn is_wrapper(prefix: &str) -> bool {
    let mut rest = prefix;
    while let Some(inner) = WRAPPERS.iter().find_map(|one| rest.strip_prefix(one)) {
        rest = inner;
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: [&str; 4] = [
        "model.embed.weight",
        "model.layers.0.norm.weight",
        "model.layers.1.norm.weight",
        "lm_head.weight",
    ];

    /// What becomes of the names, if they are renamed.
    fn renamed(names: &[&str], known: &[&str]) -> Option<Vec<String>> {
        let others = prefixes(known.iter().copied());
        let known = |name: &str| known.contains(&name);
        let renaming = Renaming::find(names.iter().copied(), &others, known)?;
        let names = names.iter().map(|name| renaming.apply(name));
        names.map(|name| name.map(Cow::into_owned)).collect()
    }

    fn before(prefix: &str, names: &[&str]) -> Vec<String> {
        names.iter().map(|name| format!("{prefix}{name}")).collect()
    }

    /// Whichever side has a prefix, and whichever tensors are named: all, some, one.
    #[test]
    fn a_prefix_of_all_names_on_either_side_is_found() {
        let prefixes = [
            "",
            "_orig_mod.",
            "module.",
            "base_model.model.",
            "module._orig_mod.",
            "m.",
            "anything/at.all.",
        ];
        for named in [&MODEL[..], &MODEL[1..3], &MODEL[1..2], &MODEL[3..], &[]] {
            for prefix in prefixes {
                let long = before(prefix, named);
                let long: Vec<&str> = long.iter().map(String::as_str).collect();
                let found = renamed(&long, &MODEL);
                assert_eq!(found, Some(before("", named)), "{prefix} {named:?}");

                let model = before(prefix, &MODEL);
                let model: Vec<&str> = model.iter().map(String::as_str).collect();
                let found = renamed(named, &model);
                assert_eq!(found, Some(before(prefix, named)), "{prefix} {named:?}");

                let found = renamed(&long, &model);
                assert_eq!(found, Some(before(prefix, named)), "{prefix} {named:?}");
            }
        }
        // One on each side, of which the names' own is a wrapper's.
        let exported = before("m.", &MODEL);
        let exported: Vec<&str> = exported.iter().map(String::as_str).collect();
        let compiled = before("_orig_mod.", &MODEL);
        let compiled: Vec<&str> = compiled.iter().map(String::as_str).collect();
        assert_eq!(
            renamed(&compiled, &exported),
            Some(before("m.", &MODEL)),
            "both sides"
        );
    }

    #[test]
    fn what_is_mixed_unknown_or_ambiguous_is_not_renamed() {
        let cases: [(&[&str], &[&str]); 8] = [
            // Some with a prefix, some without, or with another.
            (&["module.lm_head.weight", "model.embed.weight"], &MODEL),
            (
                &["module.lm_head.weight", "other.model.embed.weight"],
                &MODEL,
            ),
            // One name that is unknown with every prefix.
            (&["module.lm_head.weight", "module.lm_head.bias"], &MODEL),
            (&["nobody.weight"], &MODEL),
            // No part of a name.
            (&["xlm_head.weight"], &MODEL),
            // A part is not exchanged for another.
            (
                &["decoder.weight"],
                &["encoder.weight", "encoder.norm.weight"],
            ),
            // Two tensors may be meant.
            (&["a.b.c.weight"], &["b.c.weight", "c.weight", "d"]),
            // Only some of the known names have it.
            (&["weight"], &["m.weight", "n.bias"]),
        ];
        for (names, known) in cases {
            assert_eq!(renamed(names, known), None, "{names:?}");
        }
    }

    #[test]
    fn names_that_are_known_stay_even_where_others_would_fit() {
        let known = ["a.weight", "a.a.weight"];
        assert_eq!(
            renamed(&["a.a.weight"], &known),
            Some(vec!["a.a.weight".into()])
        );
        // Here the first is known as it is, and both are by one renaming.
        let wrapped = ["a.a.weight", "a.a.a.weight"];
        assert_eq!(
            renamed(&wrapped, &known),
            Some(vec!["a.weight".into(), "a.a.weight".into()])
        );
    }

    #[test]
    fn prefixes_are_whole_parts_and_not_too_many() {
        let found = prefixes(["a.bc.d.x", "a.bc.d.y", "a.bc.dd"]);
        assert_eq!(found, ["", "a.", "a.bc."]);
        assert_eq!(prefixes(["ä.x", "ã.x"]), [""]);
        assert_eq!(prefixes(["x"]), [""]);
        assert_eq!(prefixes([]), [""]);
        let deep = "a.".repeat(100_000);
        assert_eq!(prefixes([deep.as_str()]).len(), MAX_PARTS + 1);
    }
}
