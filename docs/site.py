"""The site: `python docs/site.py` builds docs/en and docs/zh into build/site, and fails on what is missing.

The pages link to images, to the log and to source files beside their own folder, which is right on the page
of a repository; a copy is made in which these lie inside. Then zensical builds each language, strictly, every
local link of the finished HTML is followed, and llms.txt lists the pages for readers that are programs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
CONFIGS = {"en": "zensical.toml", "zh": "zensical.zh.toml"}
_LINK = re.compile(r"(\]\()([^)#\s]+)")


def main() -> int:
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    for language, config in CONFIGS.items():
        gather(language)
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", config]
        done = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "NO_COLOR": "1"})
        if done.returncode:
            return done.returncode
    (SITE / "index.html").write_text(
        '<!doctype html><meta charset="utf-8"><title>Clinometer</title>\n'
        '<meta http-equiv="refresh" content="0; url=en/index.html">\n'
        '<a href="en/index.html">English</a> · <a href="zh/index.html">中文</a>\n',
        encoding="utf-8",
    )
    (SITE / "llms.txt").write_text(llms(), encoding="utf-8")
    broken = [*broken_links(SITE), *left_out()]
    print("\n".join(broken) or f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}")
    return 1 if broken else 0


def gather(language: str) -> None:
    """docs/LANGUAGE in build/pages, with what its pages link to outside of it."""
    source, target = ROOT / "docs" / language, PAGES / language
    shutil.copytree(source, target)
    for page in target.rglob("*.md"):
        original = source / page.relative_to(target)

        def inside(link: re.Match[str], page: Path = page, original: Path = original) -> str:
            path = (original.parent / link[2]).resolve()
            if "://" in link[2] or path.is_relative_to(source) or not path.is_relative_to(ROOT):
                return link[0]
            if not path.is_file():
                raise SystemExit(f"{original.relative_to(ROOT)}: {link[2]} does not exist")
            # A page that lies outside is text to read, not a page of this site.
            place = target / "files" / path.relative_to(ROOT)
            place = place.with_suffix(".txt") if path.suffix == ".md" else place
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
            return link[1] + os.path.relpath(place, page.parent).replace(os.sep, "/")

        page.write_text(_LINK.sub(inside, page.read_text(encoding="utf-8")), encoding="utf-8")


def entries(language: str) -> list[tuple[str, str]]:
    """(title, page) of the navigation, in order."""
    project = tomllib.loads((ROOT / CONFIGS[language]).read_text(encoding="utf-8"))["project"]

    def flat(items: list) -> list[tuple[str, str]]:
        found = []
        for item in items:
            for title, value in item.items():
                found += flat(value) if isinstance(value, list) else [(title, value)]
        return found

    return flat(project["nav"])


def left_out() -> list[str]:
    """Pages that no navigation names, and languages that do not name the same pages."""
    named = {language: [page for _, page in entries(language)] for language in CONFIGS}
    wrong = [] if named["en"] == named["zh"] else ["the two navigations name different pages"]
    for language, pages in named.items():
        folder = ROOT / "docs" / language
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}
        wrong += [f"{CONFIGS[language]}: {page} is in no navigation" for page in sorted(there - set(pages))]
    return wrong


def llms() -> str:
    """https://llmstxt.org: the pages with their first sentences."""
    about = "Trains Transformer language models, and shows, checks and explains every gradient."
    lines = ["# Clinometer", "", f"> {about}", ""]
    for title, page in entries("en"):
        text = (ROOT / "docs" / "en" / page).read_text(encoding="utf-8")
        text = re.sub(r"```.*?```|^#.*?$|<!--.*?-->", "", text, flags=re.S | re.M)
        parts = (part.strip() for part in re.split(r"\n\s*\n", text))
        first = next((part for part in parts if part and part[0] not in "|!-"), "")
        sentence = re.split(r"(?<=[.:])\s", " ".join(first.split()))[0]
        plain = re.sub(r"[*`]|\]\([^)]*\)|\[", "", sentence)
        lines.append(f"- [{title}](en/{page[:-3]}.html): {plain}")
    return "\n".join(lines) + "\n"


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.names.add(value)


def broken_links(site: Path) -> list[str]:
    """Local links of built pages that lead to no file, or to no place in it."""
    read = {}
    for page in site.rglob("*.html"):
        read[page] = _Links()
        read[page].feed(page.read_text(encoding="utf-8"))
    broken = []
    for page, found in read.items():
        if page.name == "404.html":  # its links are from the root of wherever the site will be
            continue
        for link in found.links:
            split = urlsplit(link)
            if split.scheme or split.netloc or link.startswith("/"):
                continue
            path = (page.parent / unquote(split.path)).resolve() if split.path else page
            path = path / "index.html" if path.is_dir() else path
            if not path.exists():
                broken.append(f"{page.relative_to(site)}: {link} does not exist")
            elif split.fragment and path in read and unquote(split.fragment) not in read[path].names:
                broken.append(f"{page.relative_to(site)}: {link} has no such place")
    return sorted(set(broken))


if __name__ == "__main__":
    sys.exit(main())
