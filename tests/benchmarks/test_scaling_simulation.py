"""The model of cost against world size: its corner cases are known, and the ring is the ring."""

import re
from pathlib import Path

import pytest
import scaling_simulation as simulation
from hypothesis import given
from hypothesis import strategies as st

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
WORLDS = st.integers(2, 300)


def figures(world, *options):
    return simulation.simulate(simulation.parse(list(options)), world)


def work(**changes):
    plain = {"forward": 0.01, "norms": 0.008, "attack_steps": 0, "size": 4e7, "parts": 10, "bucket": 2.5e7}
    return simulation.Work(**{**plain, **changes})


@given(st.integers(1, 40), st.floats(1e-6, 1e-3), st.floats(1e6, 1e11), st.floats(1, 1e9))
def test_a_ring_sends_a_share_of_the_bytes_in_every_round(world, latency, bandwidth, size):
    seconds = 0.0
    for _ in range(2 * (world - 1)):  # partial sums go round, then sums
        seconds += latency + size / world / bandwidth
    assert simulation.Link(latency, bandwidth, world).all_reduce(size) == pytest.approx(seconds)


@given(WORLDS, st.integers(0, 20))
def test_a_perfect_link_costs_nothing(world, attack_steps):
    options = ["--latency", "0", "--bandwidth", "1e15", "--attack-steps", str(attack_steps)]
    alone, many = figures(1, *options), figures(world, *options)
    assert many["steps"] == pytest.approx(alone["steps"])
    assert alone["steps"]["SGD"] == pytest.approx(0.01 * (2 * attack_steps + 3))
    assert alone["steps"]["ENGM, one pass"] == pytest.approx(0.01 * (2 * attack_steps + 3.8))
    assert alone["steps"]["ENGM, reweighted"] == pytest.approx(alone["steps"]["ENGM, sharded"])


@given(WORLDS, WORLDS)
def test_more_devices_never_make_a_step_shorter(one, other):
    few, many = (figures(world) for world in sorted([one, other]))
    for name, seconds in few["steps"].items():
        assert figures(1)["steps"][name] <= seconds * (1 + 1e-9) <= many["steps"][name] * (1 + 2e-9)


def test_a_single_bucket_waits_for_the_last_gradient():
    link = simulation.Link(1e-5, 1e9, 8)
    found = simulation.reduced(work(bucket=1e12), link, 1.0, 2.0)
    assert found == pytest.approx(2 + link.all_reduce(4e7))


def test_small_buckets_hide_all_but_the_last_where_the_link_is_fast():
    link = simulation.Link(0.0, 1e11, 8)
    found = simulation.reduced(work(bucket=4e5), link, 1.0, 2.0)
    assert found == pytest.approx(2 + link.all_reduce(4e5))


@pytest.mark.parametrize("scatters", [False, True])
def test_sharded_passes_bound_by_the_link_take_what_it_takes(scatters):
    link = simulation.Link(0.0, 1e9, 4)
    found = simulation.sharded_pass(work(), link, 1e-9, scatters=scatters)
    assert found == pytest.approx(link.all_gather(4e7) * (1 + scatters), rel=1e-6)


@pytest.mark.parametrize("scatters", [False, True])
def test_sharded_passes_bound_by_work_show_the_first_gather_and_the_last_scatter(scatters):
    link = simulation.Link(0.0, 1e12, 4)
    found = simulation.sharded_pass(work(), link, 1.0, scatters=scatters)
    assert found == pytest.approx(1 + link.all_gather(4e6) * (1 + scatters))


def test_what_is_printed_says_that_it_is_a_model(capsys):
    simulation.main(["--worlds", "2", "3"])
    printed = capsys.readouterr().out
    assert printed.startswith("A MODEL")
    assert "nothing here was measured" in printed
    assert f"{1e3 * figures(3)['steps']['ENGM, reweighted']:.1f}" in printed


def test_the_page_shows_what_the_script_computes():
    rows = re.findall(r"^\| (\d+) \| ([\d. |]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) >= 4
    for world, times in rows:
        assert times.split(" | ") == [f"{1e3 * t:.1f}" for t in figures(int(world))["steps"].values()]
