//! The invariants of ARCHITECTURE.md that the source itself can show. The sources are parsed, so that
//! neither a comment nor a path through `super` can hide or fake a dependency.

#![expect(
    clippy::expect_used,
    reason = "a failed step of a test is a failed test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

/// The rooms; each may import those before it.
const ROOMS: [&str; 16] = [
    "util",
    "protocol",
    "config",
    "telemetry",
    "fetch",
    "store",
    "broker",
    "model",
    "candidate",
    "engine",
    "scoring",
    "update",
    "worker",
    "fleet",
    "selftest",
    "cli",
];

/// What else must not be imported: (who, whom).
const STRANGERS: [(&str, &str); 12] = [
    // Whoever looks at workers from outside knows no more than an aggregator.
    ("fleet", "worker"),
    ("fleet", "update"),
    ("fleet", "scoring"),
    ("fleet", "engine"),
    ("fleet", "candidate"),
    ("fleet", "model"),
    // The services know nothing of each other.
    ("fetch", "telemetry"),
    ("store", "fetch"),
    ("broker", "fetch"),
    ("broker", "store"),
    // Jobs and versions meet in the worker.
    ("update", "scoring"),
    ("scoring", "fleet"),
];

/// Everything that a file names outside its tests, as absolute paths, and the methods that it calls.
#[derive(Default)]
struct Names {
    paths: BTreeSet<Vec<String>>,
    methods: BTreeSet<String>,
    texts: BTreeSet<String>,
    module: Vec<String>,
}

impl Names {
    /// Makes a path absolute: within the crate it begins with `crate`.
    fn add(&mut self, path: &[String]) {
        let mut module = self.module.clone();
        let mut rest = path;
        match rest.first().map(String::as_str) {
            Some("self") => rest = &rest[1..],
            Some("super") => {
                while rest.first().is_some_and(|part| part == "super") {
                    module.pop();
                    rest = &rest[1..];
                }
            }
            _ => {
                self.paths.insert(path.to_vec());
                return;
            }
        }
        let absolute = [&["crate".to_owned()], module.as_slice(), rest].concat();
        self.paths.insert(absolute);
    }

    fn add_tree(&mut self, tree: &syn::UseTree, before: &[String]) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_tree(&path.tree, &with(&path.ident)),
            syn::UseTree::Name(name) => self.add(&with(&name.ident)),
            syn::UseTree::Rename(rename) => self.add(&with(&rename.ident)),
            syn::UseTree::Glob(_) => self.add(before),
            syn::UseTree::Group(group) => {
                group
                    .items
                    .iter()
                    .for_each(|tree| self.add_tree(tree, before));
            }
        }
    }

    /// Macros hold tokens that nobody has parsed: paths and method calls are found by their shape.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let colon =
            |at: usize| matches!(tokens.get(at), Some(TokenTree::Punct(p)) if p.as_char() == ':');
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Group(group) => self.add_tokens(group.stream()),
                TokenTree::Ident(first) => {
                    let mut path = vec![first.to_string()];
                    while colon(at + 1)
                        && colon(at + 2)
                        && let Some(TokenTree::Ident(next)) = tokens.get(at + 3)
                    {
                        path.push(next.to_string());
                        at += 3;
                    }
                    if path.len() > 1 {
                        self.add(&path);
                    } else {
                        self.methods.insert(first.to_string());
                    }
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
            at += 1;
        }
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let tokens = match &attribute.meta {
            syn::Meta::List(list) if list.path.is_ident("cfg") => list.tokens.to_string(),
            syn::Meta::List(_) | syn::Meta::Path(_) | syn::Meta::NameValue(_) => return false,
        };
        tokens == "test"
    })
}

impl<'ast> Visit<'ast> for Names {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if is_test(&item.attrs) {
            return;
        }
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_test(&item.attrs) {
            self.add_tree(&item.tree, &[]);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        self.add(&parts);
        visit::visit_path(self, path);
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        self.methods.insert(call.method.to_string());
        visit::visit_expr_method_call(self, call);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.add_tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    fn visit_lit_str(&mut self, text: &'ast syn::LitStr) {
        self.texts.insert(text.value());
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("the folder can be read") {
        let path = entry.expect("its entries, too").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// What every file below `src` names, by the file's path there. Files of tests alone are left out.
fn files() -> &'static BTreeMap<String, Names> {
    static FILES: OnceLock<BTreeMap<String, Names>> = OnceLock::new();
    FILES.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut paths = Vec::new();
        sources(&root, &mut paths);
        let read = |path: PathBuf| {
            let below = path.strip_prefix(&root).expect("it lies below");
            let name = below.to_string_lossy().into_owned();
            let module = name.trim_end_matches(".rs").split('/').map(str::to_owned);
            let mut names = Names {
                module: module
                    .filter(|part| part != "lib" && part != "main")
                    .collect(),
                ..Names::default()
            };
            let text = std::fs::read_to_string(&path).expect("a source can be read");
            let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
            names.visit_file(&parsed);
            (name, names)
        };
        let tests = |path: &PathBuf| path.file_name().is_some_and(|name| name == "tests.rs");
        let files: BTreeMap<_, _> = paths.into_iter().filter(|p| !tests(p)).map(read).collect();
        assert!(files.len() > 100, "only {} files were found", files.len());
        files
    })
}

fn room(file: &str) -> &str {
    file.split(['/', '.']).next().unwrap_or_default()
}

#[test]
fn rooms_import_one_way() {
    let place = |room: &str| ROOMS.iter().position(|r| *r == room);
    let mut problems = Vec::new();
    for (file, names) in files() {
        let ours = room(file);
        if ["lib", "main"].contains(&ours) {
            continue;
        }
        let Some(at) = place(ours) else {
            problems.push(format!("{file} is in no room"));
            continue;
        };
        let inside = names.paths.iter().filter(|path| path[0] == "crate");
        for other in inside.filter_map(|path| path.get(1)) {
            let above = place(other).is_some_and(|other| other > at);
            if above || STRANGERS.contains(&(ours, other.as_str())) {
                problems.push(format!("{file} names crate::{other}"));
            }
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}

/// Whether a file belongs to a module, which may have files of its own below it.
fn belongs(file: &str, module: &str) -> bool {
    let rest = file.strip_prefix(module);
    rest.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

/// Exactly the files of these modules name it, each module in one file at least.
#[track_caller]
fn only_in(what: &str, modules: &[&str], names_it: impl Fn(&Names) -> bool) {
    let found = files().iter().filter(|(_, names)| names_it(names));
    let found: Vec<&str> = found.map(|(file, _)| file.as_str()).collect();
    for file in &found {
        let allowed = modules.iter().any(|module| belongs(file, module));
        assert!(allowed, "{file} names {what}, which only {modules:?} may");
    }
    for module in modules {
        let used = found.iter().any(|file| belongs(file, module));
        assert!(used, "{module} no longer names {what}: shorten the list");
    }
}

#[test]
fn each_outside_driver_is_behind_one_module() {
    for (driver, modules) in [
        ("lapin", &["broker/amqp"][..]),
        ("async_rs", &["broker/amqp/greeting"]),
        ("redis", &["store"]),
        ("ort", &["engine/session"]),
        ("prost", &["model/onnx"]),
        ("reqwest", &["fetch"]),
        ("object_store", &["fetch/bucket"]),
        ("hyper", &["telemetry/listener"]),
        ("hyper_util", &["telemetry/listener"]),
        ("prometheus", &["telemetry/metrics"]),
        ("opentelemetry", &["telemetry/spans"]),
        ("opentelemetry_sdk", &["telemetry/spans"]),
        ("opentelemetry_otlp", &["telemetry/spans"]),
        ("axum", &["telemetry", "fleet/dashboard"]),
        ("ratatui", &["cli/watch"]),
        ("sd_notify", &["worker/systemd"]),
    ] {
        only_in(driver, modules, |names| {
            let of_it = |path: &Vec<String>| path.len() > 1 && path[0] == driver;
            names.paths.iter().any(of_it)
        });
    }
}

#[test]
fn the_worker_alone_advances_its_state() {
    only_in("advance", &["worker"], |names| {
        names.methods.contains("advance")
    });
}

#[test]
fn jobs_are_settled_in_one_place_and_so_are_dead_letters_and_results() {
    let calls = |method: &'static str| move |names: &Names| names.methods.contains(method);
    only_in(
        "ack",
        &["broker/amqp", "scoring/settle", "cli/dead", "fleet/client"],
        calls("ack"),
    );
    only_in("hand_back", &["scoring", "cli/dead"], calls("hand_back"));
}

/// Whatever comes from others is read through `protocol::encoding` and `protocol::document`, where null
/// is absent, `7.0` is 7, and a key is there once. Here are those that read something else.
#[test]
fn messages_are_read_in_one_way() {
    let readers = [
        // The readers themselves.
        "protocol/json",
        // Records of this version, quickly; all others in the one way.
        "protocol/heartbeat",
        // Containers are a stranger's, with rules of their own.
        "candidate",
        // What this program has written itself.
        "update/state",
        // The index of a checkpoint, which is another program's file.
        "model/checkpoint",
        // Values as they are, to be shown or handed on.
        "selftest/bench",
        "fleet/observer",
        "cli/submit",
    ];
    let functions = ["from_slice", "from_str", "from_reader", "from_read"];
    only_in("a reader of serde", &readers, |names| {
        names.paths.iter().any(|path| {
            let crates = ["serde_json", "rmp_serde"].contains(&path[0].as_str());
            crates && path.iter().any(|part| functions.contains(&part.as_str()))
        })
    });
}

#[test]
fn the_environment_is_read_in_one_place() {
    only_in("env::vars", &["cli"], |names| {
        let is_vars = |path: &Vec<String>| path.iter().any(|part| part.starts_with("vars"));
        names.paths.iter().any(is_vars)
    });
    only_in("SCORER_", &["config/layers"], |names| {
        names.texts.contains("SCORER_")
    });
}

/// A file that two crates compile by its path is compiled twice, and its unused half needs an excuse in
/// each: what tests share is the crate `testkit`.
#[test]
fn no_module_is_compiled_by_its_path() {
    let mut found = Vec::new();
    for folder in ["src", "tests", "benches"] {
        sources(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(folder),
            &mut found,
        );
    }
    for path in found {
        let text = std::fs::read_to_string(&path).expect("a source can be read");
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let by_path = parsed.items.iter().any(|item| {
            matches!(item, syn::Item::Mod(item) if item.attrs.iter().any(|a| a.path().is_ident("path")))
        });
        assert!(!by_path, "{} names a module's path", path.display());
    }
}
