"""Hook of mkdocs: links of the documents that leave docs/ lead to pages of the site, or to the repository.

The documents are written for GitHub, where links are relative paths in the repository. CONTRIBUTING.md, CHANGELOG.md,
SECURITY.md and benchmarks/results/README.md become pages of the site. Other links that leave docs/ lead to `repo_url`;
without it, only their text is left. The environment variable SITE_REPOSITORY sets `repo_url`.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/results/README.md": "project/results.md",
}
COMMANDS = "reference/commands"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:|mailto:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_config(config):
    """Reads the address of the repository, and adds a page of each command to the navigation."""
    config.repo_url = os.environ.get("SITE_REPOSITORY")
    commands = sorted(path.stem for path in (ROOT / "docs" / COMMANDS).glob("*.md"))
    pages = [{name: f"{COMMANDS}/{name}.md"} for name in commands if name != "index"]
    (reference,) = (section["Reference"] for section in config.nav if "Reference" in section)
    reference.insert(0, {"Commands": [f"{COMMANDS}/index.md", *pages]})
    return config


def on_files(files, config):
    """Adds the files of the repository that are pages of the site."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page that leave docs/."""
    here = {target: source for source, target in PAGES.items()}
    place = page.file.src_uri
    source = here.get(place, f"docs/{place}")

    def rewrite(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        anchor = match["anchor"] or ""
        if target in PAGES or target.startswith("docs/"):
            inside = PAGES.get(target) or target.removeprefix("docs/")
            path = posixpath.relpath(inside, posixpath.dirname(place) or ".")
            return f"{match['image']}[{match['text']}]({path}{anchor})"
        if not (ROOT / target).exists():
            raise ValueError(f"{source}: the link {match['path']} leads nowhere")
        if config.repo_url:
            return f"{match['image']}[{match['text']}]({config.repo_url.rstrip('/')}/blob/main/{target}{anchor})"
        return match["text"]

    return LINK.sub(rewrite, markdown)
