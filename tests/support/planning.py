"""Plans and the fake kernel they are carried out on."""

from collections.abc import Iterable, Iterator
from typing import Any

from kubeproxy_py import rules
from kubeproxy_py.iptables import chains, plan
from kubeproxy_py.model import Tables
from kubeproxy_py.ruleset import Ruleset
from tests.support.fake_iptables import FakeIptables


def planned(ruleset: Ruleset, live: Tables, **options: Any) -> list[plan.Batch]:
    """Return the batches that lead from *live* to what *ruleset* wants."""
    return plan.plan(ruleset.tables, live, groups=ruleset.groups(), **options)


def kernel_with(ruleset: Ruleset, foreign: Tables | None = None) -> FakeIptables:
    """Return a kernel that has what *ruleset* wants, and *foreign* beside it."""
    kernel = FakeIptables(foreign)
    for batch in planned(ruleset, kernel.save()):
        kernel.restore(batch.render())
    return kernel


def foreign(tables: Tables) -> dict[str, dict[str, list[str]]]:
    """Return all but what is ours: of built-in chains all rules but our jumps."""
    jumps = set(rules.JUMPS)
    return {
        table: {
            chain: [rule for rule in texts if rules.Jump(table, chain, rule) not in jumps]
            for chain, texts in by_name.items()
            if not chains.is_ours(table, chain)
        }
        for table, by_name in tables.items()
    }


def steps(batches: Iterable[plan.Batch]) -> Iterator[str]:
    """Yield each table section as an input of its own: what the kernel does atomically."""
    for batch in batches:
        for section in batch.sections:
            yield plan.Batch((section,)).render()
