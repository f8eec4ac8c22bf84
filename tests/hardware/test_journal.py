"""The journal of a probe, and which row of two is kept."""

import os
from dataclasses import replace

import pytest

from tests.fake_domains import products, row_of
from turbopump.core.errors import ProfileError, RunDirectoryError
from turbopump.hardware.journal import (
    Header,
    Journal,
    compare,
    join,
    journal_path,
    nearer,
    quality,
    read_journal,
    replaces,
)
from turbopump.hardware.profile import Measurement

HEADER = Header("A processor", "0123", {"torch": "2.13.0"}, "/data", "2026-11-23T10:00:00+0000")
GOOD, BAD = 0.02, 0.9


@pytest.fixture
def path(tmp_path):
    return journal_path(tmp_path / "machine.json")


def rows(count, **more):
    return [row_of(trial, **more) for trial in products(count)]


def test_rows_come_back_as_they_were(path):
    written = [*rows(3), Measurement.failed(products(1, first=9)[0], "compute", "does not run"),
               row_of(products(1, first=8)[0], facts={"engine": "x", "cold": True}, error=1e-7)]  # fmt: skip
    with Journal(path, HEADER) as journal:
        for row in written:
            journal.append(row)
    with Journal(path, replace(HEADER, date="later")) as journal:
        assert list(journal.resumed.values()) == written and journal.begun == HEADER.date


def test_every_row_is_in_the_file_when_append_returns(path):
    with Journal(path, HEADER) as journal:
        for number, row in enumerate(rows(3), 1):
            journal.append(row)
            assert len(read_journal(path)[1]) == number


def test_a_line_cut_short_costs_only_that_row(path):
    with Journal(path, HEADER) as journal:
        for row in rows(3):
            journal.append(row)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 25)
    with Journal(path, HEADER) as journal:
        assert len(journal.resumed) == 2
        journal.append(rows(3)[2])
    assert len(read_journal(path)[1]) == 3


def test_the_less_noisy_of_rows_measured_twice_is_resumed(path):
    trial = products(1)[0]
    with Journal(path, HEADER) as journal:
        for spread in (BAD, GOOD, 0.5):
            journal.append(row_of(trial, spread=spread))
    with Journal(path, HEADER) as journal:
        assert [row.spread for row in journal.resumed.values()] == pytest.approx([GOOD], rel=0.05)


def test_on_the_cpu_clock_the_shorter_row_is_nearer_unless_it_is_noisy():
    trial = products(1)[0]
    short, long, loud = (row_of(trial, seconds=seconds, spread=spread, clock="thread_cpu")
                         for seconds, spread in ((1e-3, 0.1), (2e-3, GOOD), (5e-4, BAD)))  # fmt: skip
    assert nearer(long, short) is short and nearer(short, long) is short
    assert nearer(short, loud) is short and nearer(loud, short) is short
    waiting = replace(short, clock="wall")
    assert nearer(waiting, replace(long, clock="wall")).seconds == long.seconds  # the quieter


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fingerprint": "4567", "name": "Another"}, "machine: A processor (0123), not Another (4567)"),
        ({"software": {"torch": "2.14.0"}}, "torch: 2.13.0, not 2.14.0"),
        ({"directory": "/scratch"}, "directory: /data, not /scratch"),
        ({"written_by": "9.9"}, "turbopump: "),
    ],
)
def test_rows_of_other_conditions_are_refused_and_stay(path, changed, said):
    with Journal(path, HEADER) as journal:
        journal.append(rows(1)[0])
    before = path.read_bytes()
    with pytest.raises(ProfileError, match="unfinished probe") as caught:
        Journal(path, replace(HEADER, **changed))
    assert said in str(caught.value) and "--overwrite" in str(caught.value)
    assert path.read_bytes() == before
    with Journal(path, replace(HEADER, **changed), discard_foreign=True) as journal:
        assert not journal.resumed
    assert read_journal(path) == (replace(HEADER, **changed), [])


def test_a_file_that_is_no_journal_is_begun_anew(path):
    path.write_bytes(b"\x00\xff nonsense\n{}\n")
    with Journal(path, HEADER) as journal:
        assert not journal.resumed
    assert read_journal(path) == (HEADER, [])


def test_two_probes_do_not_write_one_journal(path):
    with Journal(path, HEADER), pytest.raises(ProfileError, match="another probe is writing"):
        Journal(path, HEADER)
    Journal(path, HEADER).close()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="file stands where a directory is needed"):
        Journal(tmp_path / "file" / "machine.json.partial.jsonl", HEADER)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_and_earlier_rows_stay(path):
    journal = Journal(path, HEADER)
    journal.append(rows(1)[0])
    good = journal._lines._file
    with open("/dev/full", "ab", buffering=0) as full:
        journal._lines._file = full
        with pytest.raises(RunDirectoryError, match="no space left"):
            journal.append(rows(2)[1])
        journal._lines._file = good
    journal.close()
    assert len(read_journal(path)[1]) == 1


def test_removed_when_done(path):
    journal = Journal(path, HEADER)
    journal.remove()
    assert not path.exists()


# ---- which row is kept


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        ({"spread": GOOD}, {"spread": 0.1}, True),  # both good: the newer
        ({"spread": GOOD}, {"spread": BAD}, False),
        ({"spread": GOOD}, {"spread": GOOD, "waited": 0.4}, False),
        ({"spread": BAD}, {"spread": 0.5}, True),  # less noisy
        ({"spread": 0.5}, {"spread": BAD}, False),
        ({"spread": BAD}, {"spread": GOOD}, True),
    ],
)
def test_a_good_row_is_never_replaced_by_a_noisy_one(old, new, taken):
    trial = products(1)[0]
    before, after = row_of(trial, seconds=1e-3, **old), row_of(trial, seconds=2e-3, **new)
    assert replaces(after, before) is taken
    assert join([before], [after]).rows == ((after,) if taken else (before,))
    assert join([before], [after], overwrite=True).rows == (after,)


def test_a_failure_does_not_replace_a_row_that_works_but_a_row_that_works_replaces_a_failure():
    trial = products(1)[0]
    works, failed = row_of(trial, spread=BAD), Measurement.failed(trial, "compute", "device lost")
    assert join([works], [failed]).rows == (works,)
    assert join([failed], [works]).rows == (works,)
    again = replace(failed, problem="another reason")
    assert join([failed], [again]).rows == (again,)


def test_join_counts_and_keeps_the_order():
    old = rows(3)
    new = [row_of(products(1, first=1)[0], spread=BAD), row_of(products(1, first=2)[0]), *rows(5)[3:]]
    joined = join(old, new)
    assert (joined.added, joined.replaced, joined.kept) == (2, 1, (old[1].key,))
    assert [row.key for row in joined.rows] == [row.key for row in rows(5)]
    assert joined.rows[:2] == tuple(old[:2])


def test_quality_counts_only_rows_that_work():
    some = [row_of(products(1)[0], waited=0.1), row_of(products(1, first=1)[0], spread=BAD, waited=0.3),
            Measurement.failed(products(1, first=2)[0], "compute", "no")]  # fmt: skip
    found = quality(some)
    assert found["noisy"] == 0.5 and found["waited"] == pytest.approx(0.2) and GOOD < found["spread"] < BAD
    assert quality(some[2:]) == {}


def test_comparing_needs_enough_rows_in_common():
    quiet, loud = rows(10), rows(10, spread=BAD, seconds=1.1e-3)
    found = compare(quiet, loud)
    assert found.noisier and found.common == 10 and (found.noisy_before, found.noisy_now) == (0.0, 1.0)
    assert not compare(loud, quiet).noisier
    assert not compare(quiet[:3], loud[:3]).noisier
    assert not compare(loud, loud).noisier
    assert compare(quiet, rows(20)[10:]).common == 0
    assert compare(quiet, rows(10, seconds=1.03e-3)).difference == pytest.approx(0.03)
