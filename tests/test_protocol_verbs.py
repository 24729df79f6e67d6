"""`qwen-ray protocol before | during | after`: folders, pages and exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.cli import build_parser
from qwen_ray.config import build_config
from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK, UserError
from qwen_ray.evaluation import suites
from qwen_ray.evaluation.questions import questions
from qwen_ray.fsio import write_json
from qwen_ray.serving.app import create_app
from qwen_ray.serving.service import Service
from qwen_ray.verbs import Output
from tests.browser import chromium, open_alone
from tests.conftest import disk_full
from tests.evaluation.test_protocol import eval_result
from tests.serving.live import served


def cli(*argv: str, as_json: bool = False) -> tuple[int, str]:
    """Exit code and stdout of ``qwen-ray ARGV``."""
    stdout = io.StringIO()
    args = build_parser().parse_args([*argv])
    return args.verb(args, Output(stdout, as_json=as_json)), stdout.getvalue()


@pytest.fixture(scope="module")
def tiny_items() -> list[dict[str, Any]]:
    """Items of the suite ``tiny`` as an evaluation leaves them, all wrong: ids and the right answers."""
    suite = suites.load("tiny")
    category = {task: c.name for c in suite.categories for task in c.tasks}
    return [
        {"category": category[task], "task": task, "id": id, "answer": 0, "target": 1, "score": 0.0}
        for task, id in questions(suite)
    ]


def of_tiny(items: list[dict[str, Any]], right: dict[str, float], **changes: Any) -> dict[str, Any]:
    """An EvalResult of the suite ``tiny``: a share ``right`` of each category's items."""
    names = [c.name for c in suites.load("tiny").categories]
    made = eval_result(dict.fromkeys(["biology"], 0), 1, suite="tiny")
    rows, summaries = [], {}
    for name in names:
        own = [item for item in items if item["category"] == name]
        known = round(right.get(name, 0.97) * len(own))
        rows += [{**item, "score": float(i < known), "answer": int(i < known)} for i, item in enumerate(own)]
        role = next(c.role for c in suites.load("tiny").categories if c.name == name)
        score = known / len(own)
        summaries[name] = {"role": role, "metric": "acc", "n": len(own), "score": score, "ci": [score, score]}
    controls = {"untaught facts": {**summaries.pop("untaught facts"), "explanation": "never taught"}}
    version = suites.load("tiny").version
    tables = {"categories": summaries, "controls": controls, "items": rows}
    return {**made, "suite_version": version, **tables, **changes}


WEAK = {"biology": 0.3, "history": 0.3, "security": 0.3, "untaught facts": 0.25}
BETTER = {**WEAK, "biology": 0.9, "history": 0.9, "security": 0.9}


@pytest.fixture
def saved(tmp_path: Path, tiny_items: list[dict[str, Any]]) -> Path:
    (tmp_path / "base.json").write_text(json.dumps(of_tiny(tiny_items, WEAK)))
    (tmp_path / "good.json").write_text(json.dumps(of_tiny(tiny_items, BETTER, adapter="good")))
    bad = of_tiny(tiny_items, {**BETTER, "arithmetic": 0.8}, adapter="bad")
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    return tmp_path


def test_before_and_after_of_finished_results(saved: Path) -> None:
    folder = saved / "before"
    code, said = cli("protocol", "before", "--result", str(saved / "base.json"), "--out", str(folder))
    assert code == EXIT_OK
    assert said.endswith(f"{folder / 'before.html'}\n")
    document = json.loads((folder / "before.json").read_text())
    assert document["weak"] == ["tiny/biology", "tiny/history", "tiny/security"]
    shown = document["failures"][0]["items"][0]
    assert shown["question"].startswith("Question: ")
    assert shown["target"] == shown["choices"][1]
    page = (folder / "before.html").read_text()
    assert shown["choices"][1] in page
    assert "you cannot see 5 points" in said

    after = ["protocol", "after", "--before", str(folder), "--out", str(saved / "after"), "--result"]
    code, said = cli(*after, str(saved / "good.json"), "--targets", "weak")
    assert code == EXIT_OK
    assert "verdict: promote" in said
    code, said = cli(*after, str(saved / "bad.json"), as_json=True)
    assert code == EXIT_GATE_SAID_NO
    assert json.loads(said) == json.loads((saved / "after" / "after.json").read_text())
    assert json.loads(said)["verdict"] == "regress"
    assert "Regress" in (saved / "after" / "after.html").read_text()


def test_the_gate_of_before_counts_unless_another_is_given(saved: Path) -> None:
    (saved / "gate.yaml").write_text("max_adapter_bytes: 10\n")
    (saved / "adapter").mkdir()
    (saved / "adapter" / "adapter_model.safetensors").write_bytes(bytes(11))
    folder, gate = str(saved / "before"), ["--gate", str(saved / "gate.yaml")]
    base = ["--result", str(saved / "base.json"), "--held-out", "tiny"]  # its questions are not asked for
    cli("protocol", "before", *base, *gate, "--out", folder)
    after = ["protocol", "after", "--before", folder, "--result", str(saved / "good.json")]
    after += ["--adapter", str(saved / "adapter"), "--out", str(saved / "after")]
    code, said = cli(*after)
    assert (code, "11 bytes: above" in said) == (EXIT_GATE_SAID_NO, True)
    (saved / "gate.yaml").write_text("max_adapter_bytes: 11\nmax_latency_ratio: 1.1\n")
    assert cli(*after, *gate)[0] == EXIT_GATE_SAID_NO
    assert cli(*after, *gate, "--latency", "1", "1.05")[0] == EXIT_OK
    assert cli(*after, *gate, "--latency", "1", "1.2")[0] == EXIT_GATE_SAID_NO


def test_a_held_out_suite_shows_scores_only(saved: Path) -> None:
    folder = saved / "before"
    cli(
        "protocol", "before", "--result", str(saved / "base.json"), "--held-out", "tiny", "--out", str(folder)
    )
    document = json.loads((folder / "before.json").read_text())
    assert (document["suites"][0]["held_out"], document["failures"]) == (True, [])
    assert len(document["weak"]) == 3
    assert "Question: " not in (folder / "before.html").read_text()


def test_results_without_their_suite_are_shown_by_id(saved: Path) -> None:
    (saved / "own.json").write_text(json.dumps(eval_result({"biology": 30, "arithmetic": 98})))
    code, _ = cli("protocol", "before", "--result", str(saved / "own.json"), "--out", str(saved / "before"))
    assert code == EXIT_OK
    assert "not at hand" in (saved / "before" / "before.html").read_text()


def test_a_rerun_that_fails_in_its_second_suite_leaves_no_document(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_fails(model: str, adapter: Path | None, suite: str, *, out: Path, **_: Any) -> dict[str, Any]:
        if suite == "guide":
            raise UserError("no hub")
        write_json(out, result)
        return result

    result, folder = json.loads((saved / "good.json").read_text()), saved / "before"
    monkeypatch.setattr("qwen_ray.evaluation.run.evaluate_local", second_fails)
    cli("protocol", "before", "--result", str(saved / "base.json"), "--out", str(folder))
    rerun = ["protocol", "before", "--model", "tiny", "--out", str(folder)]
    with pytest.raises(UserError, match="no hub"):
        cli(*rerun, "--suite", "guide")
    assert (folder / "before.json").exists()
    with pytest.raises(UserError, match="no hub"):
        cli(*rerun, "--suite", "tiny", "--suite", "guide")
    assert json.loads((folder / "results" / "tiny.json").read_text()) == result
    assert [path.name for path in folder.rglob("*.json")] == ["tiny.json"]


def test_a_live_model_here_and_served(tmp_path: Path) -> None:
    """The same model twice: the settings of before are used again, nothing flips, and that is no gain."""
    folder, model = tmp_path / "before", ["--model", "tiny"]
    asked = ["--suite", "tiny", "--limit", "4", "--out", str(folder)]
    assert cli("protocol", "before", *model, *asked)[0] == EXIT_OK
    result = json.loads((folder / "results" / "tiny.json").read_text())
    assert len(result["items"]) == 24
    document = json.loads((folder / "before.json").read_text())
    assert document["suites"][0]["settings"]["limit"] == 4
    service = Service.load("tiny")
    with served(create_app(service)) as url:
        again = [*model, "--endpoint", url, "--before", str(folder), "--out", str(tmp_path / "after")]
        code, said = cli("protocol", "after", *again)
    service.stop()
    assert code == EXIT_GATE_SAID_NO
    assert "tiny/biology: 0 items won, 0 lost" in said
    assert "verdict: hold" in said


def test_bad_input_is_named(saved: Path) -> None:
    base, out = str(saved / "base.json"), str(saved / "out")
    before = ["protocol", "before", "--out", out]
    with pytest.raises(UserError, match="nothing to benchmark"):
        cli(*before, "--model", "tiny")
    with pytest.raises(UserError, match="unknown suite 'tinny'"):
        cli(*before, "--model", "tiny", "--suite", "tinny")
    with pytest.raises(UserError, match="no result of the suite 'guide'"):
        cli(*before, "--result", base, "--held-out", "guide")
    with pytest.raises(UserError, match="two results of the suite 'tiny'"):
        cli(*before, "--result", base, "--result", base)
    with pytest.raises(UserError, match="120 points"):
        cli(*before, "--result", base, "--weak-below", "120")
    with pytest.raises(UserError, match="no such file"):
        cli("protocol", "after", "--before", str(saved), "--result", base, "--out", out)
    with pytest.raises(UserError, match="not seconds above 0"):
        cli("protocol", "after", "--before", out, "--result", base, "--latency", "0", "1", "--out", out)
    with pytest.raises(UserError, match="not seconds above 0"):
        cli("protocol", "after", "--before", out, "--result", base, "--latency", "0.8", "nan", "--out", out)
    assert not Path(out).exists()


def test_after_does_not_overwrite_before(saved: Path) -> None:
    folder, link = saved / "before", saved / "link"
    cli("protocol", "before", "--result", str(saved / "base.json"), "--out", str(folder))
    link.symlink_to(folder)
    with pytest.raises(UserError, match="would be overwritten"):
        cli("protocol", "after", "--before", str(folder), "--model", "tiny", "--out", str(link))
    kept = json.loads((folder / "results" / "tiny.json").read_text())
    assert kept == json.loads((saved / "base.json").read_text())


def test_a_rerun_that_breaks_off_leaves_no_document_of_the_run_before_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, result = saved / "before", saved / "after", str(saved / "base.json")
    first = ["protocol", "before", "--out", str(before), "--result", result]
    then = ["protocol", "after", "--before", str(before), "--out", str(after), "--result", result]
    live = ["--model", "no-such-server", "--endpoint", "http://127.0.0.1:1"]
    cli(*first)
    cli(*then)
    with pytest.raises(UserError):
        cli(*then[:-2], *live)
    assert (after / "after.json").exists()  # nothing of it was replaced
    monkeypatch.setattr("qwen_ray.report.protocol.write_before", disk_full)
    monkeypatch.setattr("qwen_ray.report.protocol.write_after", disk_full)
    for again in (then, first):
        with pytest.raises(OSError, match="No space"):
            cli(*again)
    assert not (after / "after.json").exists()
    assert not (before / "before.json").exists()


def test_during_reads_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml here"):
        cli("protocol", "during", str(tmp_path))
    config = build_config(None, flags={"out": str(tmp_path), "evaluate.suites": ["tiny"]})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(UserError, match="no suite was evaluated") as e:
        cli("protocol", "during", str(tmp_path))
    assert e.value.fix == "wait for the first evaluation"
    rows = [
        {"step": 0, "suite/tiny/arithmetic": 0.98},
        {"step": 50, "suite/tiny/arithmetic": 0.95, "forgetting/worst": 0.03},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 51, "lo')
    assert cli("protocol", "during", str(tmp_path))[0] == EXIT_OK
    rows.append({"step": 100, "suite/tiny/arithmetic": 0.93, "forgetting/worst": 0.05})
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = cli("protocol", "during", str(tmp_path), as_json=True)
    assert (code, json.loads(said)["broken"]) == (EXIT_GATE_SAID_NO, [100])


def test_compare_takes_a_gate(saved: Path) -> None:
    pair = [str(saved / "base.json"), str(saved / "good.json")]
    assert cli("compare", *pair)[0] == EXIT_OK
    (saved / "gate.yaml").write_text("required_suites: [guide]\n")
    code, said = cli("compare", *pair, "--gate", str(saved / "gate.yaml"))
    assert (code, "'guide' is required" in said) == (EXIT_GATE_SAID_NO, True)
    assert cli("compare", *pair, "--min-gain", "70")[0] == EXIT_GATE_SAID_NO


def test_the_pages_in_a_browser(saved: Path) -> None:
    before, after = str(saved / "before"), str(saved / "after")
    cli("protocol", "before", "--result", str(saved / "base.json"), "--out", before)
    cli("protocol", "after", "--before", before, "--result", str(saved / "bad.json"), "--out", after)
    with chromium() as browser:
        for width, scheme in ((1280, "light"), (400, "dark")):
            show = {"width": width, "scheme": scheme, "picture": saved / "page.png"}
            page = open_alone(browser, saved / "before" / "before.html", **show)
            assert page.get_by_role("heading", name="Weak tiny/biology").is_visible()
            second = page.locator("#failures-1 details").nth(1)
            assert not second.locator("pre").is_visible()
            second.locator("summary").click()
            assert second.locator("pre").is_visible()
            assert second.locator("li.right").count() == second.locator("li.given").count() == 1
            page.close()
            page = open_alone(browser, saved / "after" / "after.html", **show)
            assert page.get_by_role("heading", name="Verdict Regress").is_visible()
            won, lost = page.locator("details.won"), page.locator("details.lost")
            assert won.first.is_visible()
            page.get_by_label("lost").check()
            assert lost.first.is_visible()
            assert not won.first.is_visible()
            page.close()
