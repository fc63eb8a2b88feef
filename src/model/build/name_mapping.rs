//! How names in the checkpoint map to names in the graph. Exporting and training wrap a model in
//! modules, so that `m.model.norm.weight` in the graph is `model.norm.weight`, or
//! `module.model.norm.weight`, in the checkpoint. All names have the same prefix.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::model::prefix::{is_wrapper, prefixes};

/// How many names, the longest first, are searched for candidate prefixes.
const MAX_ASKED: usize = 64;

/// What is stripped from the checkpoint's names, and what is prepended instead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct NameMapping {
    strip: String,
    prepend: String,
    /// Single names that the library changes when it saves, prepended already: PEFT saves an adapter's
    /// tensor without the adapter's name, so `lora_B.weight` is `lora_B.default.weight` in the model.
    changed: BTreeMap<String, String>,
}

impl NameMapping {
    /// Finds the mapping under which the most names of the checkpoint occur in the graph (as
    /// initializers, inputs or paths of modules). If no mapping is better than none, or several are
    /// equally good, names stay as they are.
    pub(super) fn find(
        checkpoint: &[&str],
        initializers: &HashSet<&str>,
        modules: &HashSet<&str>,
    ) -> Self {
        // Names of initializers, which come from the model, count more than paths of modules, which
        // come from the exporter.
        let known = |mapping: &Self| {
            let (mut held, mut called) = (0_usize, 0_usize);
            for name in checkpoint.iter().map(|name| mapping.in_graph(name)) {
                let module = name.rsplit_once('.').map(|(module, _)| module);
                held += usize::from(initializers.contains(name.as_str()));
                called += usize::from(module.is_some_and(|m| modules.contains(m)));
            }
            (held, called)
        };
        let unchanged = Self::default();
        let (mut best, mut found) = (known(&unchanged), vec![unchanged]);
        let strips = prefixes(checkpoint.iter().copied()).into_iter();
        for strip in strips.filter(|prefix| !prefix.ends_with('/')) {
            for prepend in candidates(checkpoint, strip, initializers, modules) {
                // `layers.2.` does not stand for `layers.0.`.
                if !strip.is_empty() && !prepend.is_empty() && !is_wrapper(strip) {
                    continue;
                }
                let mapping = Self {
                    strip: strip.to_owned(),
                    prepend,
                    changed: BTreeMap::new(),
                };
                let count = known(&mapping);
                if count > best {
                    (best, found) = (count, vec![mapping]);
                } else if count == best {
                    found.push(mapping);
                }
            }
        }
        // The unchanged mapping comes first, if it is among the best.
        let mut first = found.swap_remove(0);
        let name = checkpoint.first().copied().unwrap_or_default();
        let same = |other: &Self| other.in_graph(name) == first.in_graph(name);
        if first != Self::default() && !found.iter().all(same) {
            first = Self::default();
        }
        let names = checkpoint.iter().map(|name| first.in_graph(name));
        let adapters =
            names.filter_map(|name| Some((adapter(&name, initializers, modules)?, name)));
        first.changed = adapters.map(|(full, name)| (name, full)).collect();
        first
    }

    /// The name in the graph of a name in the checkpoint.
    pub(super) fn in_graph(&self, name: &str) -> String {
        let rest = name.strip_prefix(self.strip.as_str()).unwrap_or(name);
        let name = format!("{}{rest}", self.prepend);
        self.changed.get(&name).cloned().unwrap_or(name)
    }

    /// The reverse.
    pub(super) fn in_checkpoint(&self, name: &str) -> String {
        let changed = self.changed.iter().find(|(_, full)| *full == name);
        self.in_module(changed.map_or(name, |(saved, _)| saved))
    }

    /// The name that a name in the graph has in the module that was wrapped, whatever the library saves it
    /// as.
    pub(super) fn in_module(&self, name: &str) -> String {
        let rest = name.strip_prefix(self.prepend.as_str()).unwrap_or(name);
        format!("{}{rest}", self.strip)
    }

    /// Adds single names, by what they are in the graph so far.
    pub(super) fn change(&mut self, names: BTreeMap<String, String>) {
        self.changed.extend(names);
    }

    /// The difference in words, if there is one.
    pub(super) fn note(&self) -> Option<String> {
        (self.strip != self.prepend).then(|| {
            format!(
                "every name starts with {:?} in the graph where it starts with {:?} in the checkpoint",
                self.prepend, self.strip
            )
        })
    }
}

/// The full name of an adapter's tensor that was saved without the adapter's name, if there is
/// exactly one adapter.
fn adapter(name: &str, initializers: &HashSet<&str>, modules: &HashSet<&str>) -> Option<String> {
    let (head, last) = name.rsplit_once('.')?;
    let is_adapter = head.rsplit('.').next()?.starts_with("lora_");
    if !is_adapter || initializers.contains(name) {
        return None;
    }
    let within = |held: &&str| Some(held.strip_prefix(head)?.strip_prefix('.')?.to_owned());
    let held = initializers.iter().filter_map(within);
    let held = held.filter_map(|rest| Some(rest.strip_suffix(last)?.strip_suffix('.')?.to_owned()));
    let found = held.chain(modules.iter().filter_map(within));
    let found: BTreeSet<String> = found.filter(|found| !found.contains('.')).collect();
    match found.first() {
        Some(only) if found.len() == 1 => Some(format!("{head}.{only}.{last}")),
        Some(_) | None => None,
    }
}

/// Prefixes before the checkpoint's names that occur in the graph.
fn candidates(
    checkpoint: &[&str],
    strip: &str,
    initializers: &HashSet<&str>,
    modules: &HashSet<&str>,
) -> BTreeSet<String> {
    let mut telling: Vec<&str> = checkpoint
        .iter()
        .filter_map(|n| n.strip_prefix(strip))
        .collect();
    telling.sort_by_key(|name| std::cmp::Reverse(name.matches('.').count()));
    telling.truncate(MAX_ASKED);
    let mut found = BTreeSet::from([String::new()]);
    for name in telling {
        let module = name.rsplit_once('.').map(|(module, _)| (module, modules));
        for (wanted, held) in std::iter::once((name, initializers)).chain(module) {
            let before = held.iter().filter_map(|held| held.strip_suffix(wanted));
            let parts = before.filter(|before| before.ends_with('.'));
            found.extend(parts.map(str::to_owned));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(checkpoint: &[&str], initializers: &[&str], modules: &[&str]) -> (String, String) {
        let set = |names: &[&'static str]| names.iter().copied().collect::<HashSet<_>>();
        let owned = |names: &[&str]| -> Vec<&'static str> {
            names.iter().map(|n| &*n.to_string().leak()).collect()
        };
        let mapping = NameMapping::find(
            checkpoint,
            &set(&owned(initializers)),
            &set(&owned(modules)),
        );
        for name in checkpoint {
            assert_eq!(mapping.in_checkpoint(&mapping.in_graph(name)), *name);
        }
        (mapping.strip, mapping.prepend)
    }

    #[test]
    fn what_stands_before_every_name_is_found_on_either_side() {
        let names = [
            "model.embed.weight",
            "model.layers.0.norm.weight",
            "head.bias",
        ];
        let with = |prefix: &str| names.map(|name| format!("{prefix}{name}"));
        for (ours, theirs) in [
            ("", ""),
            ("", "m."),
            ("_orig_mod.", ""),
            ("module.", "m."),
            ("base_model.model.", "wrapped.inner."),
        ] {
            let (checkpoint, graph) = (with(ours), with(theirs));
            let refs = |names: &'static [String; 3]| names.each_ref().map(String::as_str);
            let (checkpoint, graph) = (Box::leak(Box::new(checkpoint)), Box::leak(Box::new(graph)));
            let found = find(&refs(checkpoint), &refs(graph), &[]);
            assert_eq!(found, (ours.to_owned(), theirs.to_owned()));
        }
    }

    #[test]
    fn modules_tell_where_initializers_are_renamed() {
        let found = find(
            &["norm.weight", "up.weight"],
            &["val_1", "val_2"],
            &["m.norm", "m.up"],
        );
        assert_eq!(found, (String::new(), "m.".to_owned()));
    }

    #[test]
    fn an_adapter_is_saved_without_its_name() {
        let saved = "base_model.model.q.lora_B.weight";
        let set = |names: &[&'static str]| names.iter().copied().collect::<HashSet<_>>();
        let named = |initializers: &[&'static str], modules: &[&'static str]| {
            let mapping = NameMapping::find(&[saved], &set(initializers), &set(modules));
            let name = mapping.in_graph(saved);
            assert_eq!(mapping.in_checkpoint(&name), saved);
            name
        };
        let full = "base_model.model.q.lora_B.default.weight";
        assert_eq!(named(&[full], &[]), full);
        assert_eq!(
            named(&["val_1"], &["base_model.model.q.lora_B.default"]),
            full
        );
        assert_eq!(named(&[saved, full], &[]), saved);
        // Of two adapters it may be either.
        let two = [full, "base_model.model.q.lora_B.other.weight"];
        assert_eq!(named(&two, &[]), saved);
    }

    #[test]
    fn a_part_of_a_model_is_no_other_part() {
        let layers = [
            "layers.0.0.weight",
            "layers.1.0.weight",
            "layers.2.0.weight",
        ];
        let nothing = (String::new(), String::new());
        assert_eq!(find(&["layers.2.0.weight"], &layers[..2], &[]), nothing);
        assert_eq!(find(&["layers.2.0.weight"], &layers, &[]), nothing);
        // It may be of any of them.
        assert_eq!(find(&["0.weight"], &layers, &[]), nothing);
        let found = find(&["0.weight"], &layers[..1], &[]);
        assert_eq!(found, (String::new(), "layers.0.".to_owned()));
    }

    #[test]
    fn names_that_are_known_as_they_are_stay() {
        let found = find(
            &["a.weight", "b.weight"],
            &["a.weight", "m.a.weight", "m.b.weight", "b.weight"],
            &[],
        );
        assert_eq!(found, (String::new(), String::new()));
        assert_eq!(
            find(&["w"], &["val_1"], &[]),
            (String::new(), String::new())
        );
    }
}
