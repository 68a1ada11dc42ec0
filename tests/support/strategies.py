"""What hypothesis draws to fuzz the command line and the tables: flags, config values, and bytes that look like a table."""

import dataclasses

from hypothesis import strategies as st

from research_config import ExperimentConfig

FIELDS = tuple(entry.name for entry in dataclasses.fields(ExperimentConfig))

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["0.5", "2:1", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FLAGS = st.sampled_from([f"--{name}" for name in FIELDS] + ["--no-amp", "--no-demo", "--config", "-h", "--", "-", "--=", "-1"])
WORDS = FLAGS | st.sampled_from(["0", "-1e-5", "nan", "data/comments.csv", "data", "a=0.5", "2:1"]) | st.text(max_size=12)
ARGUMENTS = WORDS | st.tuples(FLAGS, st.text(max_size=6)).map("=".join)

MARKS = [b",", b"\t", b'"', b"\n", b"\r", b"0", b"1", b"\0", b"{", b"}", b":", b"[", b"\xff", b"\\ud83d"]
LINES = [b"\xef\xbb\xbf", b"text,spam\n", b"text\tspam\n", b'{"text": "a", "spam": 1}\n', b"a,1\n", b"a\t1\n"]
PIECES = st.sampled_from([*MARKS, *LINES, b"text", b"spam", b"1e999"])
TABLE_BYTES = st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=40).map(b"".join))
