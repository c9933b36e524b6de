"""Random CoTs for the property tests."""

from __future__ import annotations

from hypothesis import strategies as st

words = st.text("abcXYZ019é→漢.,:", min_size=1, max_size=6)
lines = st.one_of(
    st.lists(words, min_size=1, max_size=6).map(" ".join),
    st.sampled_from(
        ["```", "```python", "~~~", "````", "  ```", "", " ", "\t", "\u00a0", "    return x",
         "x = (1,", "def f(x):", "for i in y:", "# note", "- item", "So", "print(x)"]
    ),
)  # fmt: skip
raw_texts = st.lists(lines, max_size=24).map("\n".join)
any_texts = st.one_of(
    raw_texts, st.text(max_size=200), raw_texts.map(lambda t: t.replace("\n", "\r\n"))
)
steps = st.lists(st.lists(words, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=12)
