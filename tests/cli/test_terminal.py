from __future__ import annotations

from asap_cli.terminal import printable


def test_control_characters_are_shown_instead_of_sent():
    assert printable("a\x1b[2Jb\x07\x9b\x7f\r") == "a␛[2Jb␇\ufffd␡␍"


def test_ordinary_text_is_untouched():
    assert printable("tab\t, line\n, é漢 🙂") == "tab\t, line\n, é漢 🙂"
