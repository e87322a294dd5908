"""Pieces of text add up to the text, whole characters only, and nothing of a stop text gets out."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vreflection.serving.text_stream import TextStream


class Bytes:
    """A tokenizer of bytes, which cuts characters in the middle."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def run(text, stops=()):
    stream = TextStream(Bytes(), stops)
    pieces = [stream.push(byte) for byte in text.encode()]
    return stream, [*pieces, stream.finish()]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=120))
def test_pieces_add_up_and_hold_no_half_character(text):
    _, pieces = run(text)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.text("ab\u00e9", max_size=60), st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
def test_the_first_stop_text_ends_it(text, stops):
    stream, pieces = run(text, stops)
    # What a reader of the growing text would have cut at.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    shown = "".join(pieces)
    assert stream.stopped is bool(ends)
    if not ends:
        assert shown == text
        return
    seen = text[: min(ends)]
    assert shown == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_what_may_begin_a_stop_text_waits():
    stream = TextStream(Bytes(), ["stop"])
    assert [stream.push(byte) for byte in b"a st"] == ["a", " ", "", ""]
    assert stream.push(ord("x")) == "stx" and stream.finish() == ""


def test_nothing_comes_after_a_stop():
    stream = TextStream(Bytes(), ["b"])
    assert [stream.push(byte) for byte in b"abc"] == ["a", "", ""] and stream.stopped and stream.finish() == ""


def test_long_answers_are_not_decoded_again_and_again():
    class Counting(Bytes):
        longest = 0

        def decode(self, ids):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    processor = Counting()
    stream = TextStream(processor, [])
    text = "é-abc " * 300
    assert "".join([*(stream.push(byte) for byte in text.encode()), stream.finish()]) == text
    assert processor.longest <= 64
