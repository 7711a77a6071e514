"""README.md and docs/: links lead somewhere, code runs, and the README stays short."""

import re
from pathlib import Path

import pytest

from lesslib.policies import POLICIES
from lesslib.states import STATES
from lesslib.util.paths import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TOYS = ("every_second", "running_mean")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are marked `language`, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """What may stand after # in a link to a page: its headings, as GitHub writes them."""
    slugs = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        slugs.add(words.replace(" ", "-"))
    return slugs


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere, anchors included."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    relative = [link for link in links if not re.match(r"[a-z]+:", link)]
    return [link for link in relative if not resolves(page, link)]


def resolves(page: Path, link: str) -> bool:
    """Whether a relative link leads to a file or folder of the repository, and to a heading."""
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return False
    return not anchor or (target.suffix == ".md" and anchor in anchors(target))


def run_blocks(page: Path) -> None:
    """Run all Python of a page, its blocks one after the other in one namespace."""
    source = "\n".join(code_blocks(page, "python"))
    exec(compile(source, name_of(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page):
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# A heading: of `b`\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# One\n[1](b.md) [2](b.md#a-heading-of-b) [3](#one) [4](https://x.org/y)\n"
        "[5](c.md) [6](b.md#other) ![7](b.png) [8](#two) [9](../b.md)\n"
    )
    assert broken_links(page) == ["c.md", "b.md#other", "b.png", "#two", "../b.md"]


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in PAGES[1:]:
        assert page.name == "index.md" or f"]({page.name})" in index


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_the_readme_shows_the_two_commands():
    assert code_blocks(README, "")[0].splitlines() == ["./run_all.sh", "./run_all.sh --test"]


def test_the_readme_lists_every_notebook():
    listed = re.findall(r"^\| \[\d\d\]\(notebooks/(\w+\.ipynb)\)", README.read_text("utf-8"), re.M)
    assert listed == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_outside_tables_and_code_have_at_most_120_characters(page):
    lines = prose(page).splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile(page):
    for source in code_blocks(page, "python"):
        compile(source, name_of(page), "exec")


def test_the_folders_of_the_architecture_are_those_of_the_package():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = page[page.index("## The folders") : page.index("| of `ops/`")]
    named = re.findall(r"^\| `(\w+)/` \|", table, re.M)
    folders = [path.parent.name for path in (ROOT / "lesslib").glob("*/__init__.py")]
    assert sorted(named) == sorted(folders)


def test_the_tutorial_shows_the_toys_as_they_stand():
    blocks = code_blocks(ROOT / "docs" / "extending.md", "python")
    for name in TOYS:
        assert (ROOT / "tests" / "extending" / f"{name}.py").read_text("utf-8") in blocks


# The pages below load pico-llama and write some text: a few seconds each.


def test_the_readme_runs(capsys):
    run_blocks(README)
    printed = capsys.readouterr().out
    assert "torch.Size([1, 301, 4096])" in printed
    # five tokens of prompt and 199 of those written: the last one is not read
    assert "'tokens': 204" in printed


def test_using_runs(capsys):
    run_blocks(ROOT / "docs" / "using.md")
    assert "torch.Size([1, 301, 4096])" in capsys.readouterr().out


def test_extending_runs(capsys, monkeypatch):
    monkeypatch.setattr("lesslib.policies.registry.POLICIES", dict(POLICIES))
    monkeypatch.setattr("lesslib.states.registry.STATES", dict(STATES))
    run_blocks(ROOT / "docs" / "extending.md")
    printed = capsys.readouterr().out
    # numbers of a running mean with heads of 128
    assert "257" in printed.splitlines()
