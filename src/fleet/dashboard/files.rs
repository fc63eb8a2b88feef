//! The files of the page, as a browser gets them. They are part of the program: the page needs nothing else.

/// A file, and its text.
macro_rules! files {
    ($($path:literal,)*) => { [$(($path, include_str!(concat!("page/", $path)))),*] };
}

/// The page itself.
pub(super) const PAGE: &str = include_str!("page/page.html");

/// Path beside the page, and text of each other file.
pub(super) const FILES: &[(&str, &str)] = &files![
    "chart_kinds.js",
    "charts.css",
    "charts.js",
    "connection.js",
    "contributors_view.js",
    "deltas.js",
    "dom.js",
    "filter.js",
    "findings.js",
    "fleet.css",
    "fleet.js",
    "fleet_map.js",
    "format.js",
    "job_view.js",
    "lists.js",
    "main.js",
    "merge_view.js",
    "merges.css",
    "merges_view.js",
    "newest.js",
    "news.js",
    "page.css",
    "router.js",
    "shares.js",
    "sortable.js",
    "status_line.js",
    "tiles.js",
    "timeline.js",
    "vendor/uplot/LICENSE",
    "vendor/uplot/uPlot.iife.min.js",
    "vendor/uplot/uPlot.min.css",
    "worker_table.js",
    "worker_view.js",
];

/// The media type of a file, by the end of its name.
pub(super) fn media_type(path: &str) -> &'static str {
    match path.rsplit_once('.') {
        Some((_, "css")) => "text/css",
        Some((_, "js")) => "text/javascript",
        Some((_, "html")) => "text/html; charset=utf-8",
        Some(_) | None => "text/plain; charset=utf-8",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest as _, Sha256};
    use std::collections::BTreeSet;
    use std::path::Path;

    const VENDORED: &str = include_str!("page/vendor/uplot/README.md");

    #[test]
    fn every_file_of_the_page_is_served() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/fleet/dashboard/page");
        let (mut folders, mut found) = (vec![folder.clone()], BTreeSet::new());
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let name = path.strip_prefix(&folder).unwrap().to_str().unwrap();
                if !name.ends_with("README.md") && name != "page.html" {
                    found.insert(name.to_owned());
                }
            }
        }
        let served = FILES.iter().map(|(path, _)| (*path).to_owned()).collect();
        assert_eq!(found, served);
    }

    #[test]
    fn what_others_made_is_as_they_made_it() {
        let theirs = FILES.iter().filter(|(path, _)| path.starts_with("vendor/"));
        for (path, text) in theirs {
            let digest = hex::encode(Sha256::digest(text));
            let name = path.rsplit('/').next().unwrap();
            let line = format!("`{name}` SHA-256 `{digest}`");
            assert!(
                VENDORED.contains(&line),
                "the README of {path} says: {line}"
            );
        }
    }
}
