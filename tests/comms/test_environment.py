from __future__ import annotations

import pytest

from turbopump.comms.environment import RankEnvironment
from turbopump.core.errors import UsageError


def test_reads_torchruns_variables() -> None:
    assert RankEnvironment.read({}) == RankEnvironment(0, 1, 0, 1)
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert RankEnvironment.read(given) == RankEnvironment(5, 8, 1, 4)
    assert RankEnvironment.read({"RANK": "1", "WORLD_SIZE": "2"}) == RankEnvironment(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "one"}, "RANK='one' must be a whole number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK \(2\) must be less than the number of processes \(2\)"),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, r"LOCAL_RANK \(3\)"),
    ],
)
def test_refuses_what_does_not_fit(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RankEnvironment.read(given)
