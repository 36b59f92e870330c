"""Label selectors, as Kubernetes documents and apimachinery parses them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeproxy_py import label_selector
from tests.support import api_selectors

LABELS = {"team": "payments", "tier": "web", "example.com/size": "5", "empty": "", "in": "in"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "team=payments",
        "team==payments , tier in (web,api)",
        "tier notin (api, db)",
        "missing notin (a)",
        "missing!=a",
        "team",
        "!missing",
        "! missing",
        "example.com/size>4",
        "example.com/size<6,example.com/size>-1",
        "empty=",
        "empty in (,a)",
        "empty in (a,)",
        "empty=,team",
        "in in (in)",
        "in=in",
    ],
)
def test_it_is_selected(text):
    selector = label_selector.parse(text)

    assert selector.matches(LABELS)
    assert selector.text == text


@pytest.mark.parametrize(
    "text",
    [
        "team=ledger",
        "team!=payments",
        "tier in (api,db)",
        "tier notin (web)",
        "missing",
        "!team",
        "missing in (a)",
        "missing=",
        "example.com/size>5",
        "example.com/size<5",
        "team>1",
        "missing<1",
        "team=payments,tier=db",
    ],
)
def test_it_is_not_selected(text):
    assert not label_selector.parse(text).matches(LABELS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("team=a b", 'found "b", expected a comma or the end'),
        ("team,", 'found "", expected a key'),
        (",team", 'found ",", expected a key'),
        ("=a", 'found "=", expected a key'),
        ("!", 'found "", expected a key'),
        ("team is a", 'found "is", expected one of in, notin'),
        ("team(a)", 'found "(", expected one of'),
        ("team in a", "expected ( and values"),
        ("team in ()", "must not be empty"),
        ("team in (a", 'found "", expected , or )'),
        ("team in (a b)", 'found "b", expected , or )'),
        ("team in (=)", 'found "=", expected a value'),
        ("team==!a", 'found "!", expected a value'),
        ("team>web", '"web" is not an integer'),
        ("team=-a", '"-a" is not the value of a label'),
        (f"team={'a' * 64}", "is not the value of a label"),
        ("te$m=a", '"te$m" is not the key of a label'),
        ("Example.com/a=b", "is not the key of a label"),
        ("a/b/c", "is not the key of a label"),
        ("/a", "is not the key of a label"),
        (f"{'a.' * 127}a/b", "is not the key of a label"),
    ],
)
def test_an_error_names_the_selector_and_what_is_wrong(text, wanted):
    with pytest.raises(ValueError, match="cannot parse label selector") as caught:
        label_selector.parse(text)

    assert wanted in str(caught.value)
    assert text in str(caught.value)


NAMES = st.sampled_from(["team", "tier", "app.kubernetes.io/name"])
VALUES = st.sampled_from(["web", "payments", "a.b_c-d", "5"])
PARTS = st.one_of(
    st.builds("{}{}{}".format, NAMES, st.sampled_from(["=", "==", "!=", " = "]), VALUES),
    st.builds("{} {} ({},{})".format, NAMES, st.sampled_from(["in", "notin"]), VALUES, VALUES),
    st.builds("{}{}".format, st.sampled_from(["", "!"]), NAMES),
)


@given(
    st.lists(PARTS, max_size=4).map(",".join),
    st.dictionaries(NAMES, VALUES, max_size=3),
)
def test_it_means_what_the_api_server_would_select(text, labels):
    there = api_selectors.parse_labels(text) if text else ()

    assert label_selector.parse(text).matches(labels) == all(
        requirement.matches(labels) for requirement in there
    )
