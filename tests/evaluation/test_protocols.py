import pytest
import yaml

from vreflection.errors import ConfigError, DataError
from vreflection.evaluation.extraction import EXTRACTORS
from vreflection.evaluation.protocol import FOLDER, PROTOCOLS, load_protocol, protocol_from
from vreflection.evaluation.records import Item

BENCHMARKS = ("mmvp", "blink", "vstar", "hrbench4k", "hrbench8k", "mme-realworld-lite")


def item(name="mmvp", **changes):
    values = {
        "benchmark": name, "id": "7", "question": "Which {colour}?", "options": ("red", "dark blue"),
        "gold": {"original": "A"}, "labels": {}, "group": "7", "images": (), "image_keys": (), "prompt": "Own text",
    }  # fmt: skip
    return Item(**(values | changes))


@pytest.fixture
def written(tmp_path):
    """A protocol file with changed keys; a key set to `...` is left out."""

    def write(**changes):
        values = yaml.safe_load((FOLDER / "strict.yaml").read_text()) | changes
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
        return path

    return write


def test_the_shipped_ones():
    assert PROTOCOLS == ("lenient", "lmms-eval", "lmms-eval-0.7.3", "reference", "strict", "vlmevalkit")
    for name in PROTOCOLS:
        protocol = load_protocol(name)
        assert protocol.tag == f"{name}@{protocol.version}" and load_protocol(protocol.tag) == protocol
        assert protocol.extractor in EXTRACTORS and protocol.images_first
        assert set(protocol.headline) == set(BENCHMARKS)
        assert protocol_from(protocol.as_dict(), "manifest") == protocol


ASK = "\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("protocol", "name", "prompt"),
    [
        ("strict", "mmvp", f"Which {{colour}}?\nOptions:\nA. red\nB. dark blue{ASK}"),
        ("reference", "blink", f"Which {{colour}}?\nOptions:\nA. red\nB. dark blue{ASK}"),
        (
            "vlmevalkit",
            "vstar",
            "Question: Which {colour}?\nOptions:\nA. red\nB. dark blue\n"
            "Please select the correct answer from the options above. \n",
        ),
        (
            "vlmevalkit",
            "mme-realworld-lite",
            "Which {colour}? The choices are listed below:\n(A) red\n(B) dark blue\n"
            "Select the best answer to the above multiple-choice question based on the image. "
            "Respond with only the letter (A, B, C, D, or E) of the correct option. \nThe best answer is:",
        ),
        ("lmms-eval", "mmvp", f"Which {{colour}}?\nA. red\nB. dark blue{ASK}"),
        ("lmms-eval", "hrbench8k", "Which {colour}?\nA. red\nB. dark blue\nAnswer the option letter directly."),
        ("lmms-eval-0.7.3", "vstar", f"Which {{colour}}?\nA. red\nB. dark blue{ASK}{ASK}"),
        ("lmms-eval-0.7.3", "mmvp", f"Which {{colour}}?\nA. red\nB. dark blue{ASK}"),
        ("lenient", "mmvp", f"Which {{colour}}?\nOptions:\nA. red\nB. dark blue{ASK}"),
        (
            "lmms-eval",
            "blink",
            "Note: You only need to respond with A, B without providing any additional information.\nOwn text",
        ),
    ],
)
def test_prompts(protocol, name, prompt):
    assert load_protocol(protocol).prompt(item(name)) == prompt


def test_token_limits_and_pixels():
    lmms, strict = load_protocol("lmms-eval"), load_protocol("strict")
    assert [lmms.answer_tokens(name) for name in ("mmvp", "blink", "hrbench4k")] == [16, 1024, 128]
    assert lmms.max_new_tokens == 128 and strict.answer_tokens("mmvp") == strict.max_new_tokens == 512
    assert (lmms.min_pixels, lmms.max_pixels) == (256 * 28 * 28, 2048 * 28 * 28)
    assert strict.min_pixels is None and strict.max_pixels is None


def test_only_what_is_asked_decides_who_may_score_whom():
    names = ("strict", "lenient", "reference", "lmms-eval", "lmms-eval-0.7.3")
    strict, lenient, reference, old, lmms = map(load_protocol, names)
    for name in BENCHMARKS:
        assert strict.asking(name) == lenient.asking(name) == reference.asking(name) != lmms.asking(name)
        assert (old.asking(name) == lmms.asking(name)) == (name != "vstar")
    assert {name for name in BENCHMARKS if old.headline[name] != lmms.headline[name]} == {"blink"}
    assert lmms.headline["blink"] == "blink-14 macro"


def test_a_benchmark_without_a_prompt_of_its_own():
    with pytest.raises(
        DataError, match=r"blink:7: protocol lmms-eval@1 asks with the benchmark's own prompt, got none"
    ):
        load_protocol("lmms-eval").prompt(item("blink", prompt=""))


def test_a_file_of_ones_own(written):
    path = written(
        name="mine",
        version=3,
        prompt={"default": {"question": "{{{question}}}", "options": "", "option": "", "ask": ""}},
    )
    protocol = load_protocol(path)
    assert protocol.tag == "mine@3" and protocol.prompt(item()) == "{Which {colour}?}"


def test_a_shipped_name_is_taken(written):
    assert load_protocol(written()) == load_protocol("strict")
    with pytest.raises(ConfigError, match=r"got one that differs in \['max_pixels'\]; give it a name of its own"):
        load_protocol(written(max_pixels=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, r"unknown keys \['temperature'\], missing keys \[\]; a protocol has exactly"),
        ({"extractor": ...}, r"unknown keys \[\], missing keys \['extractor'\]"),
        (
            {"extractor": "gpt"},
            r"extractor: expected one of \['strict', 'lenient', .*, 'lmms-eval-0.7.3'\], got 'gpt'",
        ),
        ({"label_revision": "new"}, r"label_revision: expected one of \['original', 'corrected'\], got 'new'"),
        ({"version": "1"}, "version: expected a whole number of at least 1, got '1'"),
        ({"version": True}, "version: expected a whole number of at least 1, got True"),
        ({"name": "a@b"}, "name: expected text without @, got 'a@b'"),
        ({"images_first": "yes"}, "images_first: expected true or false, got 'yes'"),
        ({"min_pixels": 0}, "min_pixels: expected a whole number of at least 1 or null, got 0"),
        ({"min_pixels": 9, "max_pixels": 4}, "expected min_pixels <= max_pixels, got 9 and 4"),
        ({"max_new_tokens": 512}, "max_new_tokens: expected benchmarks with their values, and `default`"),
        ({"max_new_tokens": {"default": 0}}, "max_new_tokens: default: expected a whole number of at least 1, got 0"),
        ({"prompt": {"mmvp": {}}}, "prompt: expected benchmarks with their values, and `default` for the others"),
        ({"prompt": {"default": {"question": "x"}}}, r"prompt: default: unknown keys \[\], missing keys \['ask'"),
        ({"headline": {"mmvp": 3}}, "headline: expected names with texts"),
    ],
)
def test_files_that_are_refused(written, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_protocol(written(**changes))


@pytest.mark.parametrize(
    ("piece", "template", "message"),
    [
        (
            "question",
            "{item.gold}",
            r"question: expected fields among \['letters', 'prompt', 'question'\], got \['item.gold'\]",
        ),
        ("option", "{question}", r"option: expected fields among \['letter', 'text'\]"),
        ("ask", "{", "ask: .*; write a brace of the text twice"),
        ("ask", "{0}", r"ask: expected fields among \['letters'\], got \['0'\]"),
        ("ask", "{letters:{question}}", "ask: expected fields among"),
        ("ask", "{letters!r}", "ask: expected fields among"),
    ],
)
def test_templates_name_only_what_they_may(written, piece, template, message):
    pieces = {"question": "{question}", "options": "", "option": "", "ask": ""} | {piece: template}
    with pytest.raises(ConfigError, match=message):
        load_protocol(written(prompt={"default": pieces}))


def test_names_and_files_that_are_not_there(tmp_path):
    with pytest.raises(
        ConfigError, match=r"expected one of \['lenient', .*\] or a .yaml file with the same keys, got 'x'"
    ):
        load_protocol("x")
    with pytest.raises(
        ConfigError, match=r"expected strict@\d+, got strict@99: .*; use the release that has strict@99"
    ):
        load_protocol("strict@99")
    with pytest.raises(ConfigError, match="expected a protocol in YAML, got .*No such file"):
        load_protocol(tmp_path / "gone.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping of keys to values, got list"):
        load_protocol(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError, match="expected a protocol in YAML"):
        load_protocol(tmp_path / "broken.yaml")
