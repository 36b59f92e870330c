"""The same transactions on FakeIptables and on the real programs: the same answers, the same rules."""

import subprocess

import pytest

from kubeproxy_py import rules
from kubeproxy_py.errors import BatchRejected
from kubeproxy_py.iptables import chains, plan
from kubeproxy_py.ruleset import Ruleset
from tests.support import fake_iptables, states
from tests.support.fake_iptables import FakeIptables

pytestmark = pytest.mark.packet

MADE = "*nat\n:A - [0:0]\n:B - [0:0]\n-A A -j B\n-A B -j ACCEPT\nCOMMIT\n"
LONG = "KUBE-SVC-AAAAAAAAAAAAAAAAAAAA"  # 29 characters

TRANSACTIONS = {
    "chains and jumps": [MADE],
    "declaring a chain empties it": [MADE, "*nat\n:A - [0:0]\nCOMMIT\n"],
    "what is not named is left alone": [MADE, "*nat\n:C - [0:0]\nCOMMIT\n"],
    "appending keeps what is there": [MADE, "*nat\n-A A -j ACCEPT\nCOMMIT\n"],
    "inserting puts at the top": [
        "*nat\n:A - [0:0]\n:B - [0:0]\n-I OUTPUT -j A\n-I OUTPUT -j B\nCOMMIT\n"
    ],
    "jump into a chain that is declared before": ["*nat\n:B - [0:0]\n-A OUTPUT -j B\nCOMMIT\n"],
    "jump into a chain that is declared only later": [
        "*nat\n:A - [0:0]\n-A A -j C\n:C - [0:0]\nCOMMIT\n"
    ],
    "jump to nowhere": [MADE, "*nat\n-A A -j NOWHERE\nCOMMIT\n"],
    "going to a chain": [MADE, "*nat\n-A A -g B\nCOMMIT\n"],
    "jump to a built-in chain": [MADE, "*nat\n-A A -j OUTPUT\nCOMMIT\n"],
    "DROP in nat": [MADE, "*nat\n-A A -j DROP\nCOMMIT\n"],
    "REJECT in nat": [MADE, "*nat\n-A A -j REJECT\nCOMMIT\n"],
    "rule in an unknown chain": ["*nat\n-A UNKNOWN -j ACCEPT\nCOMMIT\n"],
    "insertion into an unknown chain": ["*nat\n-I UNKNOWN -j ACCEPT\nCOMMIT\n"],
    "deleting a rule": [MADE, "*nat\n-D A -j B\nCOMMIT\n"],
    "deleting the first of two equal rules": [
        "*nat\n:A - [0:0]\n-A A -j ACCEPT\n-A A -j RETURN\n-A A -j ACCEPT\nCOMMIT\n",
        "*nat\n-D A -j ACCEPT\nCOMMIT\n",
    ],
    "deleting a rule that is not there": [MADE, "*nat\n-D A -j ACCEPT\nCOMMIT\n"],
    "deleting a chain": [MADE, "*nat\n:A - [0:0]\n-X A\nCOMMIT\n"],
    "deleting a chain that is not empty": [MADE, "*nat\n-X A\nCOMMIT\n"],
    "deleting a chain that is jumped to": [MADE, "*nat\n:B - [0:0]\n-X B\nCOMMIT\n"],
    "deleting two chains that are emptied first": [
        MADE, "*nat\n:A - [0:0]\n:B - [0:0]\n-X B\n-X A\nCOMMIT\n",
    ],
    "deleting a chain whose referrer is rewritten": [
        MADE, "*nat\n:A - [0:0]\n:B - [0:0]\n-A A -j ACCEPT\n-X B\nCOMMIT\n",
    ],
    "deleting an unknown chain": ["*nat\n-X UNKNOWN\nCOMMIT\n"],
    "a refused line undoes its whole table": [
        MADE, "*nat\n:C - [0:0]\n-A A -j C\n-A A -j NOWHERE\nCOMMIT\n",
    ],
    "tables before the refused one are committed": [
        "*filter\n:F - [0:0]\n-A F -j DROP\nCOMMIT\n*nat\n-A UNKNOWN -j ACCEPT\nCOMMIT\n",
    ],
    "tables after the refused one are not looked at": [
        "*nat\n-A UNKNOWN -j ACCEPT\nCOMMIT\n*filter\n:F - [0:0]\nCOMMIT\n",
    ],
    "no COMMIT": ["*nat\n:A - [0:0]\n"],
    "no table": [":A - [0:0]\nCOMMIT\n"],
    "unknown table": ["*unknown\nCOMMIT\n"],
    "unknown command": ["*nat\n-Y A\nCOMMIT\n"],
    "chain name of 29 characters": [f"*nat\n:{LONG} - [0:0]\nCOMMIT\n"],
    "chain name of 28 characters": [f"*nat\n:{LONG[:28]} - [0:0]\nCOMMIT\n"],
    "nothing at all": [""],
    "three tables": [
        "*mangle\n:M - [0:0]\nCOMMIT\n*filter\n:F - [0:0]\n-I FORWARD -j F\nCOMMIT\n" + MADE,
    ],
}  # fmt: skip


class Kernel:
    """The real tables of node, asked as FakeIptables is."""

    def __init__(self, node, programs):
        self._node = node
        self._programs = programs

    def restore(self, text):
        done = self._node.run([self._programs.restore, "--noflush"], input=text, check=False)
        if done.returncode:
            raise BatchRejected(done.stderr)

    def save(self, *, known=None):
        saved = self._node.run([self._programs.save]).stdout
        tables = chains.parse_save(saved.splitlines(keepends=True))
        empty = fake_iptables.empty_tables()
        return {table: empty[table] | tables.get(table, {}) for table in empty}


@pytest.fixture
def kernel(clean_lab, iptables):
    return Kernel(clean_lab.namespace("node"), iptables)


def is_accepted(kernel, text):
    try:
        kernel.restore(text)
    except BatchRejected:
        return False
    return True


@pytest.mark.parametrize("texts", TRANSACTIONS.values(), ids=TRANSACTIONS)
def test_transaction_has_the_same_end(kernel, texts):
    fake = FakeIptables()
    answers = [(is_accepted(fake, text), is_accepted(kernel, text)) for text in texts]

    assert answers == [(mine, mine) for mine, _ in answers]
    assert fake.save() == kernel.save()


@pytest.fixture
def counters(clean_lab):
    """Make the counters that kube-proxy's rules name."""
    node = clean_lab.namespace("node")
    names = (rules.LOCALHOST_NODE_PORTS_COUNTER, rules.INVALID_DROPPED_COUNTER)
    try:
        for name in names:
            node.run(["nfacct", "add", name], check=False)
        if names[0] not in node.run(["nfacct", "list"]).stdout:
            pytest.skip("the kernel has no nfacct")
    except (FileNotFoundError, subprocess.SubprocessError, AssertionError):
        pytest.skip("nfacct is not installed, or the kernel does not know it")


@pytest.mark.parametrize("max_rules", [None, 20])
def test_whole_clusters_have_the_same_end(kernel, counters, family, max_rules):
    """From nothing to one cluster, to another, and back to nothing."""
    fake = FakeIptables()
    for state in ("state", "state2", None):
        ruleset = Ruleset(states.golden_options(family))
        if state is not None:
            ruleset.apply(states.service_states(states.golden_items(state), family))
        batches = plan.plan(
            ruleset.tables, fake.save(), groups=ruleset.groups(), max_rules=max_rules
        )
        for batch in batches:
            fake.restore(batch.render())
            kernel.restore(batch.render())

        assert fake.save() == kernel.save()
