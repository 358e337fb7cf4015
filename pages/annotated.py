"""The nine core files as one page: docstrings and equations on the left, code on the right.

`python evaluate.py read` writes docs/annotated.html. The page needs nothing else and no script.
"""

import ast
import io
import keyword
import re
import tokenize
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent
FILES = {
    "flow.py": "Flow matching (section 4.1)",
    "flow_dpo.py": "Flow-DPO (section 4.2)",
    "flow_rwr.py": "Flow-RWR and SFT (section 4.3)",
    "data.py": "Words, pairs, batches (section 3.1)",
    "model.py": "The video transformer (appendix D)",
    "reward.py": "VideoReward (section 3.2)",
    "nrg.py": "Flow-NRG (section 4.4)",
    "sample.py": "The sampler (appendix C)",
    "tasks.py": "What each algorithm trains on (sections 3 to 5)",
}


# ---------------------------------------------------------------------------------------------
# Segments: a piece of prose and the code beside it


def docstring_of(node):
    """The expression that is a node's docstring, or None."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or not node.body:
        return None
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first if is_text and isinstance(first.value.value, str) else None


def segments(source):
    """[(heading, prose, code)] of a file, in order. A segment begins at a section comment, at a
    function or class at the top, and at a method with a docstring."""
    lines = source.splitlines()
    tree = ast.parse(source)
    starts = {1}
    documented = [tree]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            starts.add(first_line(node, lines))
            documented.append(node)
        if isinstance(node, ast.ClassDef):
            methods = [method for method in node.body if docstring_of(method)]
            starts.update(first_line(method, lines) for method in methods)
            documented.extend(methods)
    starts.update(i + 1 for i, line in enumerate(lines) if line.startswith("# ---"))

    texts = {}  # {first line of a docstring: (last line, text)}
    for node in documented:
        if expression := docstring_of(node):
            texts[expression.lineno] = expression.end_lineno, ast.get_docstring(node)

    found = []
    starts = sorted(starts)
    for start, stop in zip(starts, [*starts[1:], len(lines) + 1]):
        heading, prose, code = "", "", []
        number = start
        while number < stop:
            line = lines[number - 1]
            if line.startswith("# ---"):
                heading = lines[number].removeprefix("# ")
                number += 1
            elif number in texts:
                number, prose = texts[number]
            else:
                code.append(line)
            number += 1
        found.append((heading, prose, "\n".join(code).strip("\n")))
    return [segment for segment in found if any(segment)]


def first_line(node, lines):
    """The line on which a definition begins, with its decorators and the comments right above."""
    number = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    while (
        number > 1
        and re.match(r"\s*# (?!---)", lines[number - 2])
        and not lines[number - 3].startswith("# ---")
    ):
        number -= 1
    return number


# ---------------------------------------------------------------------------------------------
# HTML


def equations():
    """{number: MathML} from equations.html, where each stands after a comment with its number."""
    parts = re.split(r"<!-- (\d+) -->\s*", (HERE / "equations.html").read_text())
    return dict(zip(parts[1::2], parts[2::2]))


def prose_html(text, formulas):
    """A docstring as HTML: paragraphs and indented blocks. The equation that a block ends with
    takes the block's place, others follow the paragraph that names them; `formulas` loses what it
    shows."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        numbers = [
            number for number in re.findall(r"Eq\. (\d+)(?![-\d])", block) if number in formulas
        ]
        if not block.startswith("    "):
            words = escape(" ".join(block.split()), quote=False)
            blocks.append("<p>" + re.sub(r"`([^`]+)`", r"<code>\1</code>", words) + "</p>")
        elif not numbers:
            blocks.append(f"<pre>{escape(block, quote=False)}</pre>")
        for number in dict.fromkeys(numbers):
            label = f'<span class="number">({number})</span>'
            blocks.append(f'<div class="equation">{formulas.pop(number)}{label}</div>')
    return "\n".join(blocks)


def code_html(code):
    """Python as HTML with keywords, strings, comments and numbers marked."""
    marks = []  # (start, end, class) as (row, column) pairs
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            kind = {tokenize.COMMENT: "c", tokenize.STRING: "s", tokenize.NUMBER: "n"}.get(
                token.type
            )
            if token.type == tokenize.NAME and keyword.iskeyword(token.string):
                kind = "k"
            if kind:
                marks.append((token.start, token.end, kind))
    except (tokenize.TokenError, IndentationError):  # methods end where their class goes on
        pass
    lines = code.split("\n")
    html = []
    position = (1, 0)
    for start, end, kind in marks:
        html.append(escape(text_between(lines, position, start), quote=False))
        html.append(
            f'<span class="{kind}">{escape(text_between(lines, start, end), quote=False)}</span>'
        )
        position = end
    html.append(escape(text_between(lines, position, (len(lines), len(lines[-1]))), quote=False))
    return "".join(html)


def text_between(lines, start, end):
    """The text from one (row, column) to another; rows count from 1."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    middle = lines[start[0] : end[0] - 1]
    return "\n".join([lines[start[0] - 1][start[1] :], *middle, lines[end[0] - 1][: end[1]]])


def page():
    """The whole page as text."""
    links = []
    sections = []
    for file, title in FILES.items():
        name = file.removesuffix(".py")
        links.append(f'<a href="#{name}">{file}</a>')
        rows = []
        formulas = equations()
        for heading, prose, code in segments((ROOT / file).read_text()):
            if heading:
                rows.append(f"<h3>{escape(heading)}</h3>")
            left = prose_html(prose, formulas)
            right = f"<pre><code>{code_html(code)}</code></pre>" if code else ""
            cells = f'<div class="prose">{left}</div><div class="code">{right}</div>'
            rows.append(f'<div class="row">{cells}</div>')
        body = "\n".join(rows)
        sections.append(
            f'<section id="{name}"><h2>{file} <small>{title}</small></h2>\n{body}\n</section>'
        )
    template = (HERE / "annotated.html").read_text()
    return template.replace("{{links}}", "\n".join(links)).replace(
        "{{sections}}", "\n".join(sections)
    )


def run(settings):
    path = ROOT / "docs" / "annotated.html"
    path.write_text(page())
    print(f"wrote {path.relative_to(ROOT)}")
