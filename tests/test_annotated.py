"""docs/annotated.html: all of the core's code, its equations, and a layout that fits a phone."""

import ast
import html
import re
import shutil

import pytest

from pages import annotated

PAGE = annotated.ROOT / "docs" / "annotated.html"


def code_lines(source):
    """The lines of a file without blank lines, section headings and the docstrings of the module,
    its functions, its classes and their methods."""
    tree, lines = ast.parse(source), source.splitlines()
    nodes = [tree]
    for node in tree.body:
        nodes.append(node)
        if isinstance(node, ast.ClassDef):
            nodes.extend(node.body)
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            for number in range(docstring.lineno, docstring.end_lineno + 1):
                lines[number - 1] = ""
    for i, line in enumerate(lines):
        if line.startswith("# ---"):
            lines[i : i + 2] = ["", ""]
    return [line for line in lines if line.strip()]


def test_the_page_has_all_code_of_the_core_and_every_equation():
    page = PAGE.read_text()
    assert len(page) < 1_000_000 and "<script" not in page and 'src="' not in page
    shown = "\n".join(re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL))
    shown = html.unescape(re.sub(r"<[^>]+>", "", shown)).splitlines()
    expected = [
        line for file in annotated.FILES for line in code_lines((annotated.ROOT / file).read_text())
    ]
    assert [line for line in shown if line.strip()] == expected
    numbers = {int(number) for number in re.findall(r'class="number">\((\d+)\)', page)}
    assert {1, 2, 4, 5, 6, 7, 8, 9, 10, 11} <= numbers


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="no chromedriver")
def test_the_page_fits_a_phone_and_sets_its_equations():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        for width in (400, 1280):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            driver.get(PAGE.as_uri())
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            code = driver.find_element("css selector", "#flow_dpo .code")
            prose = driver.find_element("css selector", "#flow_dpo .prose")
            beside = code.location["x"] > prose.location["x"] + 100
            assert beside == (width == 1280)
        assert driver.find_element("css selector", "math").size["height"] > 10
    finally:
        driver.quit()
