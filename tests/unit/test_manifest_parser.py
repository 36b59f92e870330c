import contextlib
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import manifest_parser
from kubeproxy_py.manifest_parser import Document, UnparsableError


def parse(text: str):
    return [document.value for document in manifest_parser.parse_yaml(text.encode())]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("on", True, id="on is a boolean"),
        pytest.param("No", False, id="no is a boolean"),
        pytest.param("y", "y", id="y is text"),
        pytest.param("~", None, id="tilde is null"),
        pytest.param("8080", 8080, id="decimal"),
        pytest.param("-1", -1, id="negative"),
        pytest.param("0755", 493, id="octal"),
        pytest.param("0x1F", 31, id="hexadecimal"),
        pytest.param("0b11", 3, id="binary"),
        pytest.param("1_000", 1000, id="with underscores"),
        pytest.param("09", "09", id="no octal number, so text"),
        pytest.param("0x_", "0x_", id="no digits, so text"),
        pytest.param("1.5", 1.5, id="fraction"),
        pytest.param("-.inf", float("-inf"), id="infinity"),
        pytest.param("1:30", "1:30", id="base 60 is text"),
        pytest.param("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z", id="date is text"),
        pytest.param("'80'", "80", id="quoted number is text"),
        pytest.param("!!str 80", "80", id="number tagged as text"),
        pytest.param("!!int 80", 80, id="number tagged as number"),
        pytest.param("<<", "<<", id="merge mark outside a mapping is text"),
        pytest.param("10.0.0.1", "10.0.0.1", id="IP address"),
    ],
)
def test_scalar_is_read_as_kubectl_reads_it(text, value):
    assert parse(f"- {text}") == [[value]]


def test_documents_know_their_lines_and_empty_ones_are_left_out():
    text = b"---\n# nothing\n---\na: 1\n---\n\n---\nb: 2\n"

    assert manifest_parser.parse_yaml(text) == [Document(3, {"a": 1}), Document(7, {"b": 2})]


def test_anchors_and_merge_keys_are_expanded():
    text = "a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}\nc: {<<: [{z: 3}, *a], z: 4}\nd: [*a, *a]\n"
    a = {"x": 1, "y": 1}

    assert parse(text) == [
        {"a": a, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 1, "z": 4}, "d": [a, a]}
    ]


def laughs(template):
    lines = [b"l0: &l0 {x: 1}"]
    lines += [
        template % (level, level, b", ".join([b"*l%d" % (level - 1)] * 10))
        for level in range(1, 12)
    ]
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(b"a: b: c", "line 1, column 5: mapping values", id="syntax"),
        pytest.param(b"a: 1\na: 2", "line 2, column 1: key 'a' is there twice", id="key twice"),
        pytest.param(b"\x80", "line 1: invalid leading UTF-8 octet", id="not UTF-8"),
        pytest.param(b"a\n\n\x01", "line 3: control characters", id="control character"),
        pytest.param(b"!!python/object:os.system x", "tag", id="tag of a Python object"),
        pytest.param(b"!mine {}", "tag '!mine' is not supported", id="unknown tag"),
        pytest.param(b"{[a]: b}", "a key must not be a list", id="list as key"),
        pytest.param(b"{<<: 1}", "a merge key", id="merging a number"),
        pytest.param(b"*a", "'a' names nothing", id="unknown alias"),
        pytest.param(b"&a [*a]", "names nothing that is complete", id="value inside itself"),
        pytest.param(b"9" * 5000, "too large", id="huge number"),
        pytest.param(b"[" * 200_000, "nested deeper than 100", id="deep lists"),
        pytest.param(b"{a: " * 200_000, "nested deeper than 100", id="deep mappings"),
        pytest.param(b"- " * 200_000, "nested deeper than 100", id="deep block lists"),
        pytest.param(laughs(b"l%d: &l%d [%s]"), "too many values", id="billion laughs"),
        pytest.param(laughs(b"l%d: &l%d {<<: [%s]}"), "too many values", id="merged laughs"),
    ],
)
def test_bad_yaml_is_refused_soon_and_says_where(text, message):
    started = time.process_time()
    with pytest.raises(UnparsableError, match="cannot parse YAML: ") as caught:
        manifest_parser.parse_yaml(text)

    assert message in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(b"", "truncated", id="empty"),
        pytest.param(b'{"a": [1,\n2,,]}', "line 2, column 3: JSON is malformed", id="syntax"),
        pytest.param(b"[" * 100_000, "nested too deep", id="deep"),
        pytest.param(b'"\xff"', "cannot parse JSON", id="not UTF-8"),
        pytest.param(b"1e999", "out of range", id="huge number"),
    ],
)
def test_bad_json_is_refused_and_says_where(text, message):
    with pytest.raises(UnparsableError, match="cannot parse JSON: ") as caught:
        manifest_parser.parse_json(text)

    assert message in str(caught.value)


def test_json_cut_anywhere_is_refused():
    text = b'{"kind": "List", "items": [{"kind": "Node"}, {"kind": "Service"}]}'

    for length in range(len(text)):
        with pytest.raises(UnparsableError):
            manifest_parser.parse_json(text[:length])


def test_json_may_begin_with_a_byte_order_mark():
    assert manifest_parser.parse_json(b'\xef\xbb\xbf{"a": 1}') == [Document(1, {"a": 1})]


# Text made of YAML's own signs finds more than random text does.
yaml_like = st.lists(
    st.sampled_from(
        ["a", "b", ": ", "- ", "\n", "  ", "[", "]", "{", "}", ",", "&a ", "*a", "!!int ", "!!map ",
         "'", '"', "|\n", "#", "? ", "---\n", "...\n", "<<: ", "~", "0", "1_", ".5", "%YAML 1.1\n"]
    )
).map(lambda parts: "".join(parts).encode())  # fmt: skip


@pytest.mark.parametrize("parse_text", [manifest_parser.parse_yaml, manifest_parser.parse_json])
@given(st.binary() | st.text().map(str.encode) | yaml_like)
def test_any_bytes_give_values_or_an_unparsable_error(parse_text, text):
    with contextlib.suppress(UnparsableError):
        assert all(isinstance(document.line, int) for document in parse_text(text))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values.filter(lambda value: value is not None))
def test_both_parsers_read_the_same_from_json(value):
    text = msgspec.json.encode(value)

    assert [document.value for document in manifest_parser.parse_json(text)] == [value]
