"""The summary of a machine in a terminal: what stands in it, and that it fits."""

from dataclasses import replace

import pytest

from tests import synthetic_profile
from turbopump.hardware.specs import LinkSpec, StorageSpec
from turbopump.reporting.probe_text import short_list, summary

STORAGE = StorageSpec("/data", 1.2e9, 5e8, 35_000, 1.85e-4, "measured")
LINKS = tuple(LinkSpec(f"gloo, {n} ranks", "node", 7e8, 8e-5, "measured") for n in (2, 4, 6, 7, 8))


@pytest.fixture(scope="module")
def profile():
    made = synthetic_profile.build()
    return replace(made, storage=(STORAGE,), links=LINKS, left_out=tuple(f"group {n}" for n in range(40)))


@pytest.mark.parametrize("columns", [20, 40, 80, 100, 300])
def test_no_line_is_wider_than_the_terminal_or_100_columns(profile, columns):
    assert max(map(len, summary(profile, columns).splitlines())) <= max(40, min(columns, 100))


def test_it_names_peaks_with_their_routes_and_everything_else_once(profile):
    said = summary(profile, 100)
    names = [line.split()[0] for line in said.splitlines()[1:] if line[0] != " "]
    assert names[:2] == ["products", "memory"] and names == list(dict.fromkeys(names))
    assert {"storage", "collectives", "launch", "quality", "left"} <= set(names)
    assert "read 1.2 GB/s, write 500 MB/s, 35 k reads/s of 4 KiB, latency 185 µs" in said
    assert "mkldnn.matmul.fp32_precision=bf16 (default " in " ".join(said.split()) and "rows noisy" in said
    assert "... and 37 more (in the file)" in said and "... and 2 more (in the file)" in said


def test_a_profile_with_nothing_in_it_has_a_title(profile):
    empty = replace(profile, rows=(), links=(), storage=(), quality={}, left_out=(), uncertain=(), devices=())
    assert len(summary(empty).splitlines()) <= 2 and profile.name in summary(empty)


def test_names_cannot_steer_the_terminal(profile):
    assert "\x1b" not in summary(replace(profile, name="x\x1b[31m", left_out=("a\x1b[2J",)))


def test_reads_are_shown_where_too_little_was_measured_for_a_storage(profile):
    said = summary(replace(profile, storage=()), 100)
    assert "storage      " in said and "random reads " in said


def test_short_lists_are_whole():
    assert short_list(["a", "b", "c", "d"]) == ["a", "b", "c", "d"]
    assert short_list(["a", "b", "c", "d", "e"]) == ["a", "b", "c", "... and 2 more (in the file)"]
