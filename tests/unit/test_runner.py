"""Finding and running iptables' programs, against programs of our own."""

import contextlib
import os
import stat

import pytest
from structlog.testing import capture_logs

from kubeproxy_py.dispatch import ChainId
from kubeproxy_py.errors import BackendMissing, BatchRejected, IptablesError, LockTimeout
from kubeproxy_py.iptables import nftables, runner
from kubeproxy_py.model import IPFamily

V4, V6 = IPFamily.V4, IPFamily.V6
BATCH = "*nat\n:A - [0:0]\n-A A -j B\nCOMMIT\n"
VERSIONS = {
    "nft": "iptables v1.8.9 (nf_tables)",
    "legacy": "iptables v1.8.9 (legacy)",
    "old": "iptables v1.6.1",
    "broken": "no such thing",
}


class Programs:
    """A directory of programs that says and does what a test wants."""

    def __init__(self, directory):
        self.directory = directory
        self.calls = directory / "calls"

    def write(self, name, *, says="", complains="", status=0, body=""):
        """Write one program; it notes its arguments and keeps its input."""
        path = self.directory / name
        (self.directory / f"{name}.says").write_text(says)
        (self.directory / f"{name}.complains").write_text(complains)
        path.write_text(
            "#!/bin/sh\n"
            f'echo "{name} $*" >> {self.calls}\n'
            f"{body}\n"
            f"cat {path}.says; cat {path}.complains >&2\n"
            f"exit {status}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def family(self, prefix, kind, saved=""):
        """Write the three programs of one family."""
        self.write(prefix, says=VERSIONS[kind])
        self.write(f"{prefix}-save", says=saved)
        self.write(f"{prefix}-restore", body=f"cat > {self.directory}/input")

    def all(self, kinds, saved=None):
        """Write the programs of both families under all their names."""
        for family in ("iptables", "ip6tables"):
            for suffix, kind in kinds.items():
                self.family(f"{family}{suffix}", kind, (saved or {}).get(kind, ""))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Give programs that are found before the host's."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return Programs(tmp_path)


@pytest.fixture
def iptables(programs):
    """Give an Iptables over programs that succeed and say nothing."""
    programs.family("iptables-nft", "nft")
    return runner.Iptables(runner.find_programs(V4, "nft"))


# Finding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "prefix"), [(V4, "iptables"), (V6, "ip6tables")])
@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_programs_of_a_backend_are_found_by_their_own_name(programs, family, prefix, backend):
    programs.all({"-nft": "nft", "-legacy": "legacy", "": "nft"})

    assert runner.find_programs(family, backend) == runner.Programs(
        family,
        backend,
        f"{programs.directory}/{prefix}-{backend}-save",
        f"{programs.directory}/{prefix}-{backend}-restore",
        (1, 8, 9),
    )


@pytest.mark.parametrize(
    ("kind", "backend"), [("nft", "nft"), ("legacy", "legacy"), ("old", "legacy")]
)
def test_plain_iptables_is_of_the_backend_it_names(programs, kind, backend):
    programs.all({"-nft": "broken", "-legacy": "broken", "": kind})

    assert runner.find_programs(V4, backend).save == f"{programs.directory}/iptables-save"


@pytest.mark.parametrize(
    ("kind", "backend"), [("nft", "legacy"), ("legacy", "nft"), ("broken", "nft")]
)
def test_programs_of_the_other_backend_are_not_taken(programs, kind, backend):
    programs.all({"-nft": "broken", "-legacy": "broken", "": kind})

    with pytest.raises(
        BackendMissing, match=f"cannot find a working iptables for backend {backend}"
    ):
        runner.find_programs(V4, backend)


@pytest.mark.parametrize(
    ("version", "is_able"),
    [((1, 6, 1), False), ((1, 6, 2), True), ((1, 8, 9), True), ((1, 10), True)],
)
def test_random_fully_is_known_by_version(version, is_able):
    assert runner.Programs(V4, "nft", "", "", version).has_random_fully is is_able


# Detecting ---------------------------------------------------------------------------------------

HINT = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"
KUBELET = "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"
TWO_RULES = "*nat\n:A - [0:0]\n-A A -j B\n-A A -j C\nCOMMIT\n"
ONE_RULE = "*nat\n:A - [0:0]\n-A A -j B\nCOMMIT\n"


def detect(programs, saved, *, legacy_tables="nat\n"):
    programs.all({"-nft": "nft", "-legacy": "legacy"}, saved)
    names = programs.directory / "ip_tables_names"
    names.write_text(legacy_tables)
    return runner.detect_backend([V4, V6], {V4: names, V6: names}).backend


@pytest.mark.parametrize(
    ("saved", "backend"),
    [
        pytest.param({"nft": HINT, "legacy": TWO_RULES}, "nft", id="hint goes before rules"),
        pytest.param({"nft": KUBELET}, "nft", id="older kubelet's canary is a hint"),
        pytest.param({"nft": TWO_RULES, "legacy": HINT}, "legacy", id="hint in legacy"),
        pytest.param({"nft": ONE_RULE, "legacy": TWO_RULES}, "legacy", id="more rules in legacy"),
        pytest.param({"nft": TWO_RULES, "legacy": ONE_RULE}, "nft", id="more rules in nft"),
        pytest.param({}, "nft", id="nothing anywhere"),
    ],
)
def test_backend_is_that_of_the_kubelet_or_of_most_rules(programs, saved, backend):
    assert detect(programs, saved) == backend


def test_legacy_tables_that_do_not_exist_are_not_looked_into(programs):
    assert detect(programs, {"legacy": TWO_RULES}, legacy_tables="") == "nft"
    assert "legacy-save" not in programs.calls.read_text()


def test_backend_that_cannot_be_read_has_no_rules(programs):
    programs.all({"-nft": "nft", "-legacy": "legacy"}, {"legacy": ONE_RULE})
    for family in ("iptables", "ip6tables"):
        programs.write(f"{family}-nft-save", complains="no", status=1)
    names = programs.directory / "ip_tables_names"
    names.write_text("nat\n")
    with capture_logs() as logs:
        backend = runner.detect_backend([V4], {V4: names}).backend

    assert backend == "legacy"
    assert [line["event"] for line in logs] == [
        "iptables.survey_failed", "iptables.backend_detected",
    ]  # fmt: skip


def test_no_backend_at_all_is_told(programs):
    programs.all({"-nft": "broken", "-legacy": "broken", "": "broken"})

    with pytest.raises(BackendMissing, match="cannot find working iptables programs of either"):
        runner.detect_backend([V4, V6], {})


# Running -----------------------------------------------------------------------------------------


def test_save_is_parsed(iptables, programs):
    programs.write("iptables-nft-save", says=TWO_RULES)

    assert iptables.save() == {"nat": {"A": ("-j B", "-j C")}}


@pytest.mark.parametrize(
    "says", ["", TWO_RULES, "*nat\n:A - [0:0]\n-A B", "*nat\n:A", "*na", "*nat\n:A - [0:0]\n[1:2"]
)
def test_failed_save_is_not_believed_whatever_it_said(iptables, programs, says):
    programs.write("iptables-nft-save", says=says, complains="Killed", status=1)

    with pytest.raises(IptablesError, match=r"cannot run .*iptables-nft-save: Killed"):
        iptables.save()


#: A program that lists chains as iptables-nft-restore does, some of which it cannot show.
LISTS = r"""
while read command name; do
case "$command $name" in
"-S A") echo "-N A"; echo "-A A -j B";;
"-S EMPTY") echo "-N EMPTY";;
"-S INPUT") echo "-P INPUT DROP"; echo "-A INPUT -j A";;
"-S B") echo "chain \`B' in table \`nat' is incompatible, use 'nft' tool." >&2; exit 1;;
"-S HALF") echo "-N HALF"; echo "-A HALF -j A"
  echo "Parsing nftables rule failed" >&2; exit 3;;
"-S ROOT") echo "Permission denied (you must be root)" >&2; exit 1;;
"-S ODD") echo "something else" >&2; exit 1;;
esac
done
exit 0
"""
#: Lists one of them: iptables-nft -t nat -S CHAIN.
LISTS_ONE = 'case "$1" in -t) echo "-S $4" | $0-restore; exit $?;; esac'


@pytest.fixture
def lister(programs, monkeypatch):
    """Give an Iptables whose filter is not shown as a whole, and which has the chains of a list."""
    programs.family("iptables-nft", "nft", "# Table `nat' is incompatible, use 'nft' tool.\n")
    programs.write("iptables-nft-restore", body=LISTS)
    programs.write("iptables-nft", says=VERSIONS["nft"], body=LISTS_ONE)
    iptables = runner.Iptables(runner.find_programs(V4, "nft"))
    names = []
    told = nftables.Chain("ACCEPT", ("-m nft -j DROP",))
    monkeypatch.setattr(
        nftables, "chain_names", lambda family: {ChainId("nat", name) for name in names}
    )
    monkeypatch.setattr(
        nftables, "read_chain", lambda family, chain: told if chain.chain != "GONE" else None
    )
    return iptables, names


def test_a_table_that_is_not_shown_is_read_chain_by_chain(lister, programs):
    iptables, names = lister
    names += ["A", "EMPTY", "INPUT"]
    policies = {}

    assert iptables.save(policies) == {"nat": {"A": ("-j B",), "EMPTY": (), "INPUT": ("-j A",)}}
    assert policies == {("nat", "INPUT"): "DROP"}
    assert iptables.unreadable == frozenset()
    assert "iptables-nft -t" not in programs.calls.read_text()


def test_what_is_not_shown_of_it_is_read_as_the_kernel_tells_it(lister):
    iptables, names = lister
    long = "a" * 29
    names += ["A", "B", "EMPTY", "HALF", "INPUT", long]
    policies = {}
    opaque = ("-m nft -j DROP",)

    assert iptables.save(policies) == {
        "nat": {
            "A": ("-j B",), "B": opaque, "EMPTY": (), "HALF": opaque, "INPUT": ("-j A",), long: opaque,
        }
    }  # fmt: skip
    assert {chain.chain for chain in iptables.unreadable} == {"B", "HALF", long}
    assert policies["nat", "B"] == "ACCEPT"


def test_a_chain_that_can_be_shown_again_is_unreadable_no_more(lister, programs):
    iptables, _ = lister
    assert iptables.read_chain(ChainId("nat", "B")) == ("-m nft -j DROP",)
    assert iptables.unreadable == {ChainId("nat", "B")}
    programs.write("iptables-nft-restore", says="-N B\n")

    assert iptables.read_chain(ChainId("nat", "B")) == ()
    assert iptables.unreadable == frozenset()


def test_a_save_that_ends_at_a_rule_is_finished_chain_by_chain(lister, programs):
    iptables, names = lister
    names += ["A"]
    programs.write(
        "iptables-nft-save",
        says="*filter\n:X - [0:0]\n-A X -j Y\nCOMMIT\n*nat\n:A - [0:0]\n",
        complains="Error: unknown ipv4 meta key\nParsing nftables rule failed",
        status=3,
    )

    assert iptables.save() == {"filter": {"X": ("-j Y",)}, "nat": {"A": ("-j B",)}}
    iptables.check()


@pytest.mark.parametrize(
    ("chain", "said"),
    [("ROOT", "you must be root"), ("ODD", "something else"), ("MUTE", "does not list them")],
)
def test_a_program_that_fails_for_other_reasons_is_believed_nothing(lister, chain, said):
    iptables, names = lister
    names += [chain]

    with pytest.raises(IptablesError, match=said):
        iptables.save()


@pytest.mark.parametrize("backend", ["nft", "legacy"])
@pytest.mark.parametrize(("chain", "expected"), [("A", True), ("EMPTY", False), ("B", False)])
def test_it_is_told_whether_a_chain_has_rules(programs, monkeypatch, backend, chain, expected):
    prefix = f"iptables-{backend}"
    programs.family(prefix, backend, saved="*nat\n:A - [0:0]\n:EMPTY - [0:0]\n-A A -j B\nCOMMIT\n")
    programs.write(f"{prefix}-restore", body=LISTS)
    programs.write(prefix, says=VERSIONS[backend], body=LISTS_ONE)
    monkeypatch.setattr(runner, "list_legacy_tables", lambda family: ["nat"])
    monkeypatch.setattr(nftables, "read_chain", lambda family, chain: None)
    iptables = runner.Iptables(runner.find_programs(V4, backend))

    assert iptables.has_rules(ChainId("nat", chain)) is expected


def test_a_legacy_table_that_is_not_there_is_not_made_by_asking(programs, monkeypatch):
    programs.family("iptables-legacy", "legacy")
    monkeypatch.setattr(runner, "list_legacy_tables", lambda family: ["filter"])
    iptables = runner.Iptables(runner.find_programs(V4, "legacy"))

    assert not iptables.has_rules(ChainId("nat", "A"))
    assert "iptables-legacy-save" not in programs.calls.read_text()


def test_save_that_hangs_is_ended(programs):
    programs.family("iptables-nft", "nft")
    programs.write("iptables-nft-save", body="exec sleep 60")
    programs_found = runner.find_programs(V4, "nft")
    iptables = runner.Iptables(programs_found, process_limit_s=0.05)

    with pytest.raises(IptablesError, match="exit status -9"):
        iptables.save()


def test_restore_gives_the_text_and_leaves_the_rest_alone(iptables, programs):
    iptables.restore(BATCH)

    assert (programs.directory / "input").read_text() == BATCH
    assert programs.calls.read_text().splitlines()[-1] == "iptables-nft-restore -w 5 --noflush"


class Long:
    """A batch of more than any pipe holds."""

    lines = 60_000

    def pieces(self):
        yield "*nat\n"
        for number in range(self.lines):
            yield f"-A A -m comment --comment {number:060} -j B\n"
        yield "COMMIT\n"


def test_a_long_batch_is_given_piece_by_piece(iptables, programs):
    iptables.restore(Long())

    assert (programs.directory / "input").read_text() == "".join(Long().pieces())


def test_who_complains_at_length_before_reading_is_heard_to_the_end(iptables, programs):
    complaints = "".join(f"line {n}: RULE_APPEND failed\n" for n in range(2, Long.lines + 2))
    programs.write("iptables-nft-restore", body="cat $0.complains >&2; cat >/dev/null", status=4)
    (programs.directory / "iptables-nft-restore.complains").write_text(complaints)

    with pytest.raises(BatchRejected) as caught:
        iptables.restore(Long())
    assert len(caught.value.lines) == Long.lines
    assert caught.value.batch.count("\n") == Long.lines + 2


def test_who_ends_without_reading_is_told_by_its_status(iptables, programs):
    programs.write("iptables-nft-restore", status=3, complains="no")

    with pytest.raises(BatchRejected, match="no"):
        iptables.restore(Long())


def test_a_user_who_may_not_have_big_pipes_is_served(iptables, programs, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(runner.fcntl, "fcntl", refuse)
    iptables.restore(BATCH)

    assert (programs.directory / "input").read_text() == BATCH


def test_restore_can_be_tried_without_committing(iptables, programs):
    iptables.restore(BATCH, test=True)

    assert programs.calls.read_text().splitlines()[-1].endswith("--noflush --test")


def test_check_reads_the_nat_table(iptables, programs):
    iptables.check()

    assert programs.calls.read_text().splitlines()[-1] == "iptables-nft-save -t nat"


def test_check_tells_why_not(iptables, programs):
    programs.write("iptables-nft-save", complains="Table does not exist", status=3)

    with pytest.raises(IptablesError, match="Table does not exist"):
        iptables.check()


@pytest.mark.parametrize(
    ("complains", "status", "error"),
    [
        pytest.param(
            "Another app is currently holding the xtables lock; still 4s 0us time ahead to have a "
            "chance to grab the lock...\n"
            "Another app is currently holding the xtables lock. Stopped waiting after 5s.",
            4, LockTimeout, id="lock",
        ),
        pytest.param(
            "iptables-nft-restore: line 3: RULE_APPEND failed (Invalid argument): rule in chain "
            "KUBE-SVC-XXLOCKXXAAAAAAAA",
            4, BatchRejected, id="no lock but a chain of that name",
        ),
        pytest.param(
            "Fatal: can't open lock file /run/xtables.lock: Read-only file system",
            4, IptablesError, id="lock that can never be had",
        ),
        pytest.param(
            "iptables-nft-restore v1.8.9 (nf_tables): Could not fetch rule set generation id: "
            "Permission denied (you must be root)",
            4, IptablesError, id="permission",
        ),
        pytest.param("iptables-restore: line 3 failed", 1, BatchRejected, id="rule"),
        pytest.param("", 1, BatchRejected, id="nothing said"),
    ],
)  # fmt: skip
def test_failure_is_told_by_its_kind(iptables, programs, complains, status, error):
    programs.write(
        "iptables-nft-restore", complains=complains, status=status, body="cat >/dev/null"
    )

    with pytest.raises(IptablesError) as caught:
        iptables.restore(BATCH)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "complains",
    [
        "iptables-nft-restore v1.8.9 (nf_tables): \nline 3: RULE_APPEND failed (No such file)",
        "Error occurred at line: 3\nTry `iptables-restore -h' for more information.",
        "iptables-legacy-restore: line 3 failed",
    ],
)
def test_rejected_line_is_found_and_shown(iptables, programs, complains):
    programs.write("iptables-nft-restore", complains=complains, status=1, body="cat >/dev/null")

    with pytest.raises(BatchRejected) as caught:
        iptables.restore(BATCH)
    assert caught.value.lines == (3,)
    assert "3: -A A -j B" in caught.value.excerpt


def test_exit_status_stands_in_for_a_message(iptables, programs):
    programs.write("iptables-nft-restore", status=7, body="cat >/dev/null")

    with pytest.raises(BatchRejected, match="exit status 7") as caught:
        iptables.restore(BATCH)
    assert (caught.value.lines, caught.value.excerpt) == ((), "")


def test_a_restore_that_a_signal_ended_has_refused_nothing(iptables, programs):
    programs.write("iptables-nft-restore", body="cat >/dev/null; kill -9 $$")

    with pytest.raises(IptablesError, match="exit status -9") as caught:
        iptables.restore(BATCH)
    assert type(caught.value) is IptablesError


def test_who_writes_is_announced_before_it_is_given_anything(programs):
    programs.family("iptables-nft", "nft")
    given = programs.directory / "input"
    told = []

    @contextlib.contextmanager
    def own(family, pid):
        told.append((family, given.read_text() if given.exists() else ""))
        yield
        told.append((family, given.read_text()))

    runner.Iptables(runner.find_programs(V4, "nft"), own=own).restore(BATCH)

    assert told == [(V4, ""), (V4, BATCH)]


class Lock:
    """What a LockWatch is told."""

    def __init__(self):
        self.told = []
        self.wait = None

    @contextlib.contextmanager
    def following(self, pid):
        self.told.append("running")
        yield
        self.told.append("over")

    def finish(self, *, has_lock):
        self.told.append(has_lock)


def test_a_restore_is_followed_until_it_is_over(programs):
    programs.family("iptables-legacy", "legacy")
    lock = Lock()
    iptables = runner.Iptables(runner.find_programs(V4, "legacy"), lock=lock)
    iptables.restore(BATCH)

    assert lock.told == ["running", "over", True]


def test_a_lock_that_is_not_had_in_time_is_told_with_its_holder(programs):
    programs.family("iptables-legacy", "legacy")
    programs.write(
        "iptables-legacy-restore",
        complains="Another app is currently holding the xtables lock. Stopped waiting after 5s.",
        status=4,
        body="cat >/dev/null",
    )
    lock = Lock()
    lock.wait = "iptables (pid 7): iptables -F"
    iptables = runner.Iptables(runner.find_programs(V4, "legacy"), lock=lock)

    with pytest.raises(LockTimeout, match=r"held by iptables \(pid 7\)"):
        iptables.restore(BATCH)
    assert lock.told[-1] is False


def test_program_that_vanished_is_an_error_and_not_a_crash(iptables, programs):
    (programs.directory / "iptables-nft-restore").unlink()

    with pytest.raises(IptablesError, match=r"cannot run .*: No such file or directory"):
        iptables.restore(BATCH)


def test_program_for_saving_that_vanished_is_an_error_and_not_a_crash(iptables, programs):
    (programs.directory / "iptables-nft-save").unlink()

    with pytest.raises(IptablesError, match=r"cannot run .*: No such file or directory"):
        iptables.save()
