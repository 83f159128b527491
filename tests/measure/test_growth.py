"""What a sweep of sizes computes: the fitted growth, the networks of so many parameters, tables and chart."""

import keras
import pytest

from models import tasks
from trainers.input import load
from trainers.measure import charts, growth
from trainers.measure.growth import Measured, fitted


def row(axis, count, seconds, **changes):
    values = {"model": "resnet", "parameters": 1000, "compile_seconds": seconds / 2, "peak_mib": 500.0 + count}
    values |= {"first_update_seconds": seconds, "steps_per_second": 100 / count, "seconds": {"trace": 1.0}}
    return Measured(axis, count, **(values | changes))


def test_what_grows_by_a_constant_is_a_line():
    found = fitted([1, 2, 4, 8], [6 + 2.5 * n for n in (1, 2, 4, 8)])
    assert not found.power and (found.a, found.b) == pytest.approx((6, 2.5)) and found.error < 1e-9
    assert found.at(64) == pytest.approx(166) and str(found) == "6 + 2.5 · n"
    assert str(fitted([1, 2, 4], [10, 9, 7])) == "11 - 1 · n"


def test_what_grows_by_a_factor_is_a_power_law():
    sizes = [10**5, 10**6, 10**7, 10**8]
    found = fitted(sizes, [3e6 * n**-0.7 for n in sizes])
    assert found.power and (found.a, found.b) == pytest.approx((3e6, -0.7))
    assert str(found) == "3e+06 · n^-0.70"
    assert found.at(10**6) == pytest.approx(3e6 * 10**-4.2)


def test_noise_hides_neither():
    noise = (1.03, 0.98, 1.01, 0.97, 1.02)
    sizes = (1, 2, 4, 8, 16)
    line = fitted(sizes, [(5 + 3 * n) * e for n, e in zip(sizes, noise, strict=True)])
    assert not line.power and line.b == pytest.approx(3, rel=0.1) and 0 < line.error < 0.05
    power = fitted(sizes, [2 * n**1.5 * e for n, e in zip(sizes, noise, strict=True)])
    assert power.power and power.b == pytest.approx(1.5, abs=0.05)


def test_two_sizes_are_a_line_and_one_is_nothing():
    assert not fitted([1, 2], [1.0, 4.0]).power
    assert fitted([1], [1.0]) is None
    assert growth.growths([row("replicas", 1, 5.0)]) == {}


@pytest.mark.parametrize("parameters", [10**5, 10**6])
def test_a_network_of_so_many_parameters_has_them(parameters, data_dir):
    dataset = load.load("digits", str(data_dir))
    model, _ = tasks.model_of(growth.mlp_of(parameters), dataset.spec)
    model(dataset.zeros())
    assert model.count_params() == pytest.approx(parameters, rel=0.01)
    keras.backend.clear_session()


def test_the_tables_have_every_row_the_growth_and_what_is_left_out():
    rows = [row("replicas", 2, 10.0), row("replicas", 1, 8.0), row("workers", 1, 9.0)]
    rows += [row("parameters", 10**5, 7.0, parameters=100_090, model="mlp,width=280x280")]
    text = growth.describe(rows, ["100,000,000 parameters: no room"])
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [line.split("|")[2].strip() for line in lines[2:6]] == ["1", "2", "1", "100,090"]
    assert ["replicas", "seconds to the first update", "6 + 2 · n", "0%"] in cells
    assert "workers  | seconds" not in text, "one size has no growth"
    assert lines[-1] == "left out: 100,000,000 parameters: no room"
    facts = growth.record(rows, [])
    assert facts["growth"]["replicas"]["first_update_seconds"]["b"] == pytest.approx(2)
    assert [Measured(**each) for each in facts["rows"]] == rows


def test_the_chart_shows_each_axis_that_there_is(tmp_path):
    rows = [row(axis, count, 5.0 + count) for axis in ("replicas", "workers") for count in (1, 2, 4)]
    charts.write_growth(tmp_path / "all.png", rows, "two")
    charts.write_growth(tmp_path / "one.png", rows[:1], "one")
    for name in ("all.png", "one.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
