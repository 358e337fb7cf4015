"""Any bytes and any text a user may hand over: either they are taken, or one line says why not; nothing runs for long.

pip install hypothesis && python -m pytest -m slow tests/test_fuzz.py
"""

import io
from argparse import ArgumentTypeError

import pytest

from real_data import pairs_csv

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import sample
import world
from data import TOY_WORDS, Vocabulary, vocabulary_of
from model import ModelConfig, VideoTransformer, load_velocity
from runtime.cli import BadInput, triple

pytestmark = pytest.mark.slow
FUZZ = settings(
    max_examples=5000,
    deadline=5000,  # ms for one input: what takes longer hangs
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WORDS = st.lists(
    st.sampled_from([*TOY_WORDS, "purple", "", "-", "'"]) | st.text(max_size=5), max_size=12
)


@FUZZ
@given(st.text() | WORDS.map(" ".join))
@example("a red circle moving left")
def test_prompts(prompt):
    try:
        y = Vocabulary().encode([prompt], 8)
        assert y.shape == (1, 8) and 0 <= y.min() and y.max() < len(TOY_WORDS)
        attributes = world.prompt_attributes([prompt])
        assert attributes.shape == (1, 3)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) > 10
    words = vocabulary_of([prompt])  # a vocabulary of real prompts takes anything with a word in it
    if len(words.words) > 2:
        assert words.encode([prompt], 4)[0, 0] >= 2


ODD = st.sampled_from(["1e3", "+1", "1_0", "∞", "٣", "nan", "", " 2"])
NUMBER = st.floats().map(str) | st.integers().map(str) | ODD


@FUZZ
@given(st.text() | st.lists(NUMBER, max_size=5).map(",".join))
@example("1,1,0.5")
def test_nrg_strings(text):
    try:
        values = triple(text)
        assert len(values) == 3 and all(abs(value) < float("inf") for value in values)
    except ArgumentTypeError as error:  # which the parser makes a line that names the flag
        assert "three numbers" in str(error)


def test_nrg_strings_are_read_so_by_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["sample.py", "--nrg", "1,nan,1", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(BadInput, match="--nrg: 1,nan,1: must be three numbers"):
        sample.main()


HEADER = ",".join(pairs_csv.COLUMNS)
ROW = "a.mp4,./a.mp4,a cat,A,same,B,2,8,2,8"
CELL = st.sampled_from(
    ["a.mp4", "../a.mp4", "a.npy:3", "A", "B", "same", "x", "nan", "1e9", "-1", "", '"', "\x00"]
)
CELLS = st.lists(CELL | st.text(max_size=4), max_size=12).map(",".join)
LINES = st.lists(st.sampled_from([HEADER, ROW]) | CELLS, max_size=5)


@st.composite
def spoiled(draw, whole):
    """`whole` bytes with a few of them changed, cut out or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        put = draw(st.binary(max_size=8))
        content[at : at + draw(st.integers(0, 8))] = put
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


GOOD = f"{HEADER}\n{ROW}\n".encode()


@FUZZ
@given(
    st.binary()
    | LINES.map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))
    | spoiled(GOOD)
)
@example(GOOD)
def test_csv_bytes(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.mp4").touch()
    (folder / "x.csv").write_bytes(content)
    for skipped in (None, []):
        try:
            assert pairs_csv.read_pairs(folder / "x.csv", skipped)
        except BadInput as error:
            assert str(error).startswith(str(folder / "x.csv")) and "\n" not in str(error)


torch.manual_seed(0)
CONFIG = ModelConfig(dim=4, depth=1, heads=2, frames=2, size=8, channels=1, vocab=4, max_text=1)
TINY = VideoTransformer(CONFIG)
FACTS = {"kind": "velocity", "config": vars(CONFIG), "vocabulary": ["<pad>", "a"], "step": 1}
STATE = {"format": 1, **FACTS, "model": TINY.state_dict()}


def file_of(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(torch.zeros(3))
)
VALUE = st.recursive(
    PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


@st.composite
def other_states(draw):
    """The state of a good file with values of any kind in some places."""
    state = {
        name: dict(value) if isinstance(value, dict) else value for name, value in STATE.items()
    }
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from([state, state["config"], state["model"]]))
        if not isinstance(where, dict) or not where:
            continue
        where[draw(st.sampled_from(sorted(map(str, where))) | st.text(max_size=5))] = draw(VALUE)
    return file_of(state)


@FUZZ
@given(st.binary() | spoiled(file_of(STATE)) | other_states())
@example(file_of(STATE))
def test_checkpoint_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "x.pt"
    path.write_bytes(content)
    try:
        model, words = load_velocity(path)
        assert isinstance(model, VideoTransformer) and isinstance(words, list)
    except BadInput as error:
        assert str(path) in str(error) and "\n" not in str(error)
