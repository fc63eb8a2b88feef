"""Lets the documentation site show files that live outside docs/: a hook of MkDocs, see mkdocs.yml.

Documents link to files by relative paths, as GitHub follows them. Here each file that is linked gets a place on the site:
a document of PAGES is a page, a picture is copied, and anything else is shown as text below files/. A link to a file
that does not exist is left alone, and the strict build refuses it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs"

# Documents outside docs/, and where they are on the site.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "benches/RESULTS.md": "measurements.md",
    "ops/runbook.md": "runbook.md",
}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=(?:#[^)\s]*)?\))")
LANGUAGES = {".py": "python", ".rs": "rust", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml", ".json": "json"}


def on_files(files, config):
    for source, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for file in list(files.documentation_pages()):
        for target in LINK.findall(file.content_string):
            source = linked(file.src_uri, target)
            if source and files.get_file_from_path(site_place(source)) is None:
                files.append(shown(source, config))
    return files


def on_page_markdown(markdown, page, files, **_):
    here = page.file.src_uri

    def moved(match):
        source = linked(here, match[0])
        if source is None or files.get_file_from_path(site_place(source)) is None:
            return match[0]
        return posixpath.relpath(site_place(source), posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)


def linked(page, target):
    """The file of the repository that a link of this page leads to, if there is one."""
    if ":" in target or page.startswith("files/"):
        return None
    places = {place: source for source, place in PAGES.items()}
    source = places.get(page, f"{DOCS}/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if (ROOT / path).is_file() else None


def site_place(source):
    """Where a file of the repository is on the site."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith(f"{DOCS}/"):
        return source.removeprefix(f"{DOCS}/")
    return f"files/{source}" if is_picture(source) else f"files/{source}.md"


def is_picture(source):
    return source.endswith((".png", ".svg"))


def shown(source, config):
    """A file outside docs/ as the site shows it."""
    path = ROOT / source
    if is_picture(source):
        return File.generated(config, site_place(source), abs_src_path=str(path))
    text, language = path.read_text(encoding="utf-8"), LANGUAGES.get(path.suffix, "text")
    page = f"---\nsearch:\n  exclude: true\n---\n# {source}\n\n`````{language}\n{text.rstrip()}\n`````\n"
    return File.generated(config, site_place(source), content=page)
