"""The comparison on the CPU, without the library of the peers: figures follow from times."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cpu import page, peer


def test_ratios_say_how_many_times_as_fast_ours_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"erniequant 2 bits": 2.0, "ggml slow": 6.0, "ggml fast": 1.0}
    calls: list[tuple[str, int]] = []
    every = [
        peer.Competitor(name, 2.0, 0.1, lambda call, name=name: calls.append((name, call)))  # type: ignore[misc]
        for name in seconds
    ]

    def clock(run: Any) -> float:
        run()
        return seconds[calls[-1][0]]

    monkeypatch.setattr(peer, "wall_clock", clock)
    monkeypatch.setattr(peer, "others_seconds", lambda: 0.0)
    rows = {row.name: row for row in peer.compare("21b", 4, every, 6)}
    assert rows["erniequant 2 bits"].ratios == {}
    assert rows["ggml slow"].ratios == {"erniequant 2 bits": (3.0, 3.0, 3.0)}
    assert rows["ggml fast"].ratios == {"erniequant 2 bits": (0.5, 0.5, 0.5)}
    # Four tokens, six experts of 3 * 2560 * 1536 weights.
    found = rows["ggml slow"].products_per_second
    assert found == pytest.approx(4 * 6 * 3 * 2560 * 1536 / 6.0 / 1e9)
    # Every call, timed or not, has other weights than the one before.
    own = [call for name, call in calls if name == "ggml fast"]
    assert all(a != b for a, b in zip(own[1:], own[2:], strict=False))


def test_a_common_factor_is_no_misfit() -> None:
    values = torch.randn(100)
    assert peer.misfit(1.05 * values, values) == pytest.approx(0, abs=1e-6)
    # Half of the energy is elsewhere.
    assert peer.misfit(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.5)


def test_every_packed_measurement_is_in_the_table() -> None:
    result = json.loads((Path(page.__file__).parent / "21b.json").read_text())
    rows = list(page.speed_rows([result]))[2:]
    packed = [row for row in result["rows"] if row["bits"] < 16]
    assert len(rows) == len(packed) == 4 * 6
    first = next(r for r in result["ratios"] if r["rival"].startswith("bf16"))
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[:3] == ["21b", "1", "2 bits"]
    assert cells[7].startswith(f"{first['median']:.2f} (") and cells[9] == str(first["rounds"])
