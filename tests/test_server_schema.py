"""The API does what its description says: no failure of the server, no status and no reply it does not describe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import Running

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Running]:
    flags = ("--context", "100", "--max-sessions", "100000", "--answer-s", "5")
    with Running(tmp_path_factory.mktemp("schema"), tiny_folder, *flags) as running:
        running.post("/chat", session_id="abc", message="the whale", max_len=2)
        yield running


@pytest.fixture(scope="module")
def described(served: Running) -> Any:
    return schemathesis.openapi.from_url(f"{served.address}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@pytest.mark.filterwarnings("ignore")
def test_as_described(case: Any) -> None:
    case.call_and_validate(
        excluded_checks=[schemathesis.checks.load_all_checks and check for check in _excluded()], timeout=30
    )


def _excluded() -> list[Any]:
    from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

    # What is well-formed may still be refused: a session that is not there, a grammar that is none.
    return [positive_data_acceptance, unsupported_method]
