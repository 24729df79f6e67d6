"""The page of a sweep: what it says of results of many shapes, and that it shows whole in a browser."""

import re
from pathlib import Path
from typing import Any

import pytest
from sweep_example import sweep
from test_report import Balance

from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json
from qwen_ray.report.sweep import write_sweep_report
from qwen_ray.report.sweep_curves import panels
from qwen_ray.report.sweep_plots import Scale, apart
from qwen_ray.report.sweep_rows import TrialRow, Verdict, mix_text, shown, signed, trial_rows, verdict
from tests.browser import open_alone

TWO = ("biology", "replay")


def page_of(out: Path, **settings: Any) -> str:
    return write_sweep_report(sweep(out, **{"trials": 4, "domains": TWO} | settings)).read_text()


def verdict_of(out: Path, **settings: Any) -> Verdict:
    sweep(out, **{"trials": 4, "domains": TWO} | settings)
    result = read_json(out / "result.json")
    return verdict(result, trial_rows(result, out))


def test_winner_with_its_values_and_intervals(tmp_path):
    found = verdict_of(tmp_path)
    assert (found.tone, found.word) == ("promote", "Trial 3")
    assert found.sentence == "Won with learning_rate 0.00668, r 16, mix biology 58, replay 42 %."
    loss, base, reference = found.reasons
    assert "nats a token lower than without an adapter; strengths (replay) kept within the" in loss
    assert base.endswith("against the base: +31.0 points on the targets (interval +25.0 to +37.0).")
    assert reference.endswith("uniform mix: +7.0 points (interval +2.0 to +12.0, n=300).")
    page = write_sweep_report(tmp_path).read_text()
    assert '<section id="verdict" class="verdict promote"' in page
    assert all(text in page for text in (found.sentence, loss, base))
    assert "Base and winner, in points of 100" in page
    assert "5.9 times what this sweep took" in page
    assert "qwen-ray train --config" in page


def test_an_interval_with_zero_is_no_evidence(tmp_path):
    found = verdict_of(tmp_path, versus=(-0.01, 0.06))
    assert found.tone == "hold"
    assert found.sentence.endswith("There is no evidence that it beats the reference.")
    assert found.reasons[-1].endswith("n=300): no evidence that it is better.")


def test_without_a_benchmark_there_is_no_interval(tmp_path):
    found = verdict_of(tmp_path, confirmed=False)
    assert found.tone == "hold"
    assert found.sentence.startswith("Won by held-out loss alone")
    assert found.reasons[-1] == "No benchmark was run on it, so there is no interval."


def test_nothing_feasible_names_the_nearest(tmp_path):
    found = verdict_of(tmp_path, feasible=False, failed=(2,))
    assert (found.tone, found.word) == ("regress", "No winner")
    assert found.sentence == "No trial kept every strength within the tolerance."
    assert found.reasons[0].startswith("Nearest: trial 0 (learning_rate 0.002")
    assert "lost 0.020 nats more than the tolerance" in found.reasons[0]
    assert found.reasons[1] == "1 of 4 trials failed."


def test_failed_trials_say_why(tmp_path):
    page = page_of(tmp_path, failed=(0, 1, 2, 3))
    assert "No trial got as far as a report." in page
    assert "4 of 4 trials failed." in page
    assert "Trial 2 failed: the loss is nan at step 3" in page
    assert "qwen-ray train" not in page


def test_one_trial_without_a_mixture(tmp_path):
    page = page_of(tmp_path, trials=1, domains=())
    assert "The reference</h2>\n<p>No trial did better" in page
    assert "<fieldset" not in page
    for absent in ("mixes", "pareto", "values", "mix-search"):
        assert f'<section id="{absent}">' not in page
    assert '<section id="curves">' in page


def test_mix_search_shows_how_well_scores_told(tmp_path):
    search: dict[str, Any] = {
        "candidates": 300,
        "verdict": "merged experts rank mixes unlike real runs (rank correlation 0.72, below 0.9)",
        "fallback": 2,
        "verified": [{"index": i, "proxy": 0.1 * i, "real": 0.09 * i} for i in range(3)],
    }
    page = page_of(tmp_path, mix_search=search)
    assert "300 mixes were scored by merging the experts of the domains, and 3 of them" in page
    assert "Merged experts rank mixes unlike real runs (rank correlation 0.72, below 0.9)." in page
    assert "2 more mixes were found by real runs only." in page
    assert "Gain by the merged experts against that of the real run. 0: 0.000 and 0.000; 1: +0.100" in page


def test_markup_is_balanced_alone_and_the_same_every_time(tmp_path):
    page = page_of(tmp_path, trials=6, domains=("biology", "history", "replay"))
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert not re.search(r"https?:|<(script|iframe|img|object|embed)\b|@import|\bsrc=", page)
    assert page.count('role="img" aria-label="') == page.count("<svg") == 6
    assert "#0c0c" not in page  # no stand-in of a colour is left
    assert write_sweep_report(tmp_path).read_text() == page


def test_what_comes_from_outside_is_escaped(tmp_path):
    bad = '<script>alert("$x$")</script>'
    page = page_of(tmp_path, trials=2, domains=(bad, "replay"), name=bad)
    assert "<script" not in page
    assert "<h1>Sweep &lt;script&gt;" in page


def test_rows_are_ranked_for_every_column(tmp_path):
    page = page_of(tmp_path, trials=6)
    rows = re.findall(r'<tr role="row" class="([^"]*)" style="([^"]*)">\s*<th[^>]*>(\d+)<', page)
    assert len(rows) == 6
    places = {int(index): [int(x) for x in re.findall(r": (\d+);", style)] for _, style, index in rows}
    assert [places[i][0] for i in range(6)] == list(range(6))  # by trial
    by_gain = sorted(places, key=lambda i: places[i][1])
    assert by_gain[0] == 3
    assert by_gain == [int(index) for *_, index in rows]
    for column in range(7):
        assert sorted(place[column] for place in places.values()) == list(range(6))
    rates = {t["index"]: t["values"]["optim.learning_rate"] for t in _trials(tmp_path)}
    assert sorted(places, key=lambda i: places[i][3]) == sorted(rates, key=lambda i: rates[i])


def _trials(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(out / "result.json")["trials"]
    return found


def test_a_folder_without_a_result_is_named(tmp_path):
    with pytest.raises(UserError, match=r"result\.json: no such file"):
        write_sweep_report(tmp_path)


def test_scales():
    assert Scale([1e-4, 1e-3, 1e-2]).at == pytest.approx([0, 0.5, 1])  # logarithmic
    assert Scale([2, 3, 4]).at == [0, 0.5, 1]
    words = Scale(["cosine", "linear", "cosine", None])
    assert words.at == [0.25, 0.75, 0.25, None]
    assert words.ticks == [(0.25, "cosine"), (0.75, "linear")]
    assert not Scale([5, 5]).varies
    assert Scale([5, 5]).at == [0.5, 0.5]


def test_labels_keep_their_distance():
    assert apart([1.0, 1.0, 5.0, 1.05], 0.5) == [1.0, 1.5, 5.0, 2.0]


def test_words_for_numbers():
    assert [shown(v) for v in (0.0123456, 1e-5, True, 16, "cosine", None)] == [
        "0.0123", "1e-5", "true", "16", "cosine", "null"]  # fmt: skip
    assert mix_text({"a": 3.0, "b": 1.0}) == "a 75, b 25"
    assert [signed(x, 1) for x in (0.04, -0.04, 1, -1)] == ["0.0", "0.0", "+1.0", "−1.0"]


def test_a_loss_that_exploded_does_not_flatten_the_others():
    curves = [[(1.0, 3.0), (2.0, 2.0)]] * 3 + [[(1.0, 3.0), (2.0, 900.0)]]
    rows = [
        TrialRow(i, "random", "done", {}, {}, 0.1, 0.0, True, 1.0, 1.0, curve)
        for i, curve in enumerate(curves)
    ]
    svg = panels(rows, 0, "x")
    assert svg
    ticks = [float(t.replace("−", "-")) for t in re.findall(r">([−\d.]+)</text>", svg)]
    assert max(ticks) < 10


# -- in a browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_sweep_report(sweep(tmp_path_factory.mktemp("sweep"), trials=12, failed=(4,)))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_shows_whole_and_alone(browser, report, tmp_path, width, scheme):
    page = open_alone(browser, report, width=width, scheme=scheme, picture=tmp_path / "sweep.png")
    assert page.get_by_role("heading", name="Winner Trial 6").is_visible()
    for title in (
        "Benchmark",
        "Trials",
        "Losses",
        "What the values did",
        "Mixes",
        "Gain and forgetting",
        "Cost",
    ):
        assert page.get_by_role("heading", name=title, exact=True).is_visible()
    plots = page.locator("svg.plot")
    assert plots.count() == 6
    for i in range(6):
        box = plots.nth(i).bounding_box()
        assert box["width"] > 300
        assert box["height"] > 80
    table = page.get_by_role("table", name=re.compile("Trials"))
    assert table.get_by_role("row").count() == 13
    page.close()


def test_table_sorts_by_the_keyboard(browser, report):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(report.as_uri())

    def order() -> list[int]:
        rows = page.locator("#trials tbody tr").all()
        tops = {int(r.locator("th").inner_text().split()[0]): r.bounding_box()["y"] for r in rows}
        return sorted(tops, key=lambda index: tops[index])

    assert order()[0] == 6
    assert order()[-1] == 4  # which failed
    page.get_by_role("radio", name="gain").focus()
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("radio", name="trial", exact=True).is_checked()
    assert order() == list(range(12))
    rates = {t["index"]: t["values"]["optim.learning_rate"] for t in _trials(report.parent)}
    page.get_by_role("radio", name="learning_rate").check()
    assert order() == sorted(rates, key=lambda index: rates[index])
    page.close()
