import io
import json
import random

import pytest

from vreflection.data import json_list
from vreflection.data.json_list import scan_json_list
from vreflection.errors import DataError

AWKWARD = [
    {"text": 'braces }{ ][ , quotes \\" \\\\ and "inner"', "emoji": "😀é\u2028", "n": [1, [2.5e-3, -0]], "o": {}},
    {"escaped": "\x00\t\x07 \U0001f600"},
    [],
    {},
    "",
    "x\\",
    123456789,
    -1.5e300,
    True,
    None,
    float("nan"),
    float("-inf"),
    [[["deep"]]],
]


def scan(data: bytes, path):
    path.write_bytes(data)
    return list(scan_json_list(io.BytesIO(data), path))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 2**20])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False, "indent": 1}])
def test_places_are_those_of_the_elements(block, style, monkeypatch, tmp_path):
    monkeypatch.setattr(json_list, "_BLOCK", block)
    for ends in ("\n", "\r\n"):
        for mark in (b"", b"\xef\xbb\xbf"):
            data = mark + (json.dumps(AWKWARD, **style).replace("\n", ends) + ends).encode()
            places = scan(data, tmp_path / "rows.json")
            assert repr([value for *_, value in places]) == repr(AWKWARD)
            assert repr([json.loads(data[start:end]) for start, end, _ in places]) == repr(AWKWARD)
            assert all(data[start : start + 1].strip() and data[end - 1 : end].strip() for start, end, _ in places)
    assert scan(b" [ ] ", tmp_path / "rows.json") == []


def test_damage_anywhere_is_refused_where_the_standard_decoder_refuses_it(monkeypatch, tmp_path):
    whole = json.dumps(AWKWARD[:8], ensure_ascii=False, indent=1)
    rng = random.Random(0)
    for _ in range(300):
        monkeypatch.setattr(json_list, "_BLOCK", rng.choice([1, 5, 40, 2**20]))
        at = rng.randrange(len(whole))
        more = whole[:at] + rng.choice('"[]{},:x') + whole[at:]
        damaged = rng.choice([whole[:at], whole[:at] + whole[at + 1 :], more])
        try:
            expected = json.loads(damaged)
        except json.JSONDecodeError as error:
            with pytest.raises(DataError) as caught:
                scan(damaged.encode(), tmp_path / "rows.json")
            assert caught.value.reason == "file-not-json"
            assert f"line {error.lineno} column {error.colno} (" in str(caught.value), (damaged, str(caught.value))
        else:
            assert [value for *_, value in scan(damaged.encode(), tmp_path / "rows.json")] == expected


@pytest.mark.parametrize(
    "data, quoted",
    [
        (b'["\xc3', "byte 0xc3 at position 2"),
        (b'["a",\n "b\xff"]', "byte 0xff at position 9"),
        (b'{"a": 1}\n{"a": 2}\n', "name a file of one object per line .jsonl: line 2 column 1"),
    ],
)
@pytest.mark.parametrize("block", [1, 4, 2**20])
def test_other_files(data, quoted, block, monkeypatch, tmp_path):
    monkeypatch.setattr(json_list, "_BLOCK", block)
    with pytest.raises(DataError) as caught:
        scan(data, tmp_path / "rows.json")
    assert caught.value.reason == "file-not-json" and quoted in str(caught.value)


def test_a_row_without_end_does_not_fill_the_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(json_list, "_BLOCK", 64)
    monkeypatch.setattr(json_list, "MAX_ROW_BYTES", 1000)
    data = io.BytesIO(b'["' + b"x" * 100_000 + b'"]')
    (tmp_path / "rows.json").write_bytes(data.getvalue())
    with pytest.raises(DataError, match="a row of more than 0 MB: line 1 column 2 "):
        list(scan_json_list(data, tmp_path / "rows.json"))
    assert data.tell() < 5000
