"""docs/annotated.html: all of the core's code, its equations, and a layout that fits a phone."""

import ast
import html
import re

from browsers import browser, check_looks  # noqa: F401

from pages import annotated

PAGE = annotated.ROOT / "docs" / "annotated.html"


def code_lines(source):
    """The lines of a file without blank lines, section headings and docstrings at the top level."""
    tree, lines = ast.parse(source), re.sub("# ---.*\n.*", "\n", source).splitlines()
    for node in (tree, *tree.body):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node):
                for number in range(node.body[0].lineno, node.body[0].end_lineno + 1):
                    lines[number - 1] = ""
    return [line for line in lines if line.strip()]


def test_the_page_has_all_code_of_the_core_and_every_equation():
    page = PAGE.read_text()
    assert len(page) < 1_000_000 and "<script" not in page and 'src="' not in page
    code = "\n".join(re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL))
    shown = html.unescape(re.sub(r"<[^>]+>", "", code)).splitlines()
    sources = [(annotated.ROOT / file).read_text() for file in annotated.FILES]
    assert [line for line in shown if line.strip()] == sum(map(code_lines, sources), [])
    numbers = set(re.findall(r'class="number">\((\d+)\)', page))
    assert set("1 2 4 5 6 7 8 9 10 11".split()) <= numbers


def test_the_page_fits_a_phone_and_sets_its_equations(browser):  # noqa: F811
    browser.get(PAGE.as_uri())
    for width, columns in ((400, 1), (1280, 2)):
        check_looks(browser, width)
        code = browser.find_element("css selector", "#flow_dpo .code")
        prose = browser.find_element("css selector", "#flow_dpo .prose")
        assert (code.location["x"] > prose.location["x"] + 100) == (columns == 2)
    assert browser.find_element("css selector", "math").size["height"] > 10
