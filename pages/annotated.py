"""The nine core files as one page: docstrings and equations on the left, code on the right.

`python evaluate.py read` writes docs/annotated.html. The page needs nothing else and no script.
"""

import ast
import keyword
import re
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
TOKENS = re.compile(
    r'(?P<s>""".*?"""|"(?:\\.|[^"\\\n])*")'  # strings, comments, keywords, numbers
    r"|(?P<c>#[^\n]*)"
    rf"|(?P<k>\b(?:{'|'.join(keyword.kwlist)})\b)"
    r"|(?P<n>\b\d[\w.]*)",
    re.DOTALL,
)


def segments(source):
    """[(heading, prose, code)] of a file, in order: its head, functions, classes and constants,
    which stand two blank lines apart."""
    found = []
    for block in re.split(r"\n\n\n|\n\n(?=# ---)", source.strip("\n")):
        heading, prose, lines = "", "", block.splitlines()
        if block.startswith("# ---"):
            heading = lines[1].removeprefix("# ")
            lines = lines[2:]
        tree = ast.parse("\n".join(lines))
        for node in (tree, *tree.body):
            may_have = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if may_have and ast.get_docstring(node):
                prose = ast.get_docstring(node)
                del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
                break
        found.append((heading, prose, "\n".join(lines).strip("\n")))
    return found


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
        names = re.findall(r"Eq\. (\d+)(?![-\d])", block)
        numbers = dict.fromkeys(number for number in names if number in formulas)
        if not block.startswith("    "):
            words = escape(" ".join(block.split()), quote=False)
            blocks.append("<p>" + re.sub(r"`([^`]+)`", r"<code>\1</code>", words) + "</p>")
        elif not numbers:
            blocks.append(f"<pre>{escape(block, quote=False)}</pre>")
        for number in numbers:
            label = f'<span class="number">({number})</span>'
            blocks.append(f'<div class="equation">{formulas.pop(number)}{label}</div>')
    return "\n".join(blocks)


def code_html(code):
    """Python as HTML with strings, comments, keywords and numbers marked."""

    def marked(token):
        return f'<span class="{token.lastgroup}">{token[0]}</span>'

    return TOKENS.sub(marked, escape(code, quote=False))


def section(file, title):
    """The HTML of one file."""
    rows, formulas = [], equations()
    for heading, prose, code in segments((ROOT / file).read_text()):
        if heading:
            rows.append(f"<h3>{escape(heading)}</h3>")
        left = prose_html(prose, formulas)
        right = f"<pre><code>{code_html(code)}</code></pre>" if code else ""
        cells = f'<div class="prose">{left}</div><div class="code">{right}</div>'
        rows.append(f'<div class="row">{cells}</div>')
    head = f'<section id="{Path(file).stem}"><h2>{file} <small>{title}</small></h2>'
    return "\n".join([head, *rows, "</section>"])


def page():
    """The whole page as text."""
    links = [f'<a href="#{Path(file).stem}">{file}</a>' for file in FILES]
    sections = [section(file, title) for file, title in FILES.items()]
    template = (HERE / "annotated.html").read_text()
    filled = template.replace("{{links}}", "\n".join(links))
    return filled.replace("{{sections}}", "\n".join(sections))


def run(settings):
    path = ROOT / "docs" / "annotated.html"
    path.write_text(page())
    print(f"wrote {path.relative_to(ROOT)}")
