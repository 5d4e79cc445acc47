"""``peelwise anatomy`` on the small GPT, and what it refuses."""

from __future__ import annotations

import json

from stages import stage_folder

QUICK = ("--tokens", 1_200, "--sequence-length", 32)


def test_the_table_the_json_and_the_page(run, tmp_path) -> None:
    out = tmp_path / "anatomy"
    code, shown, _ = run("anatomy", stage_folder("final"), *QUICK, "--studies", "ablation,predictability", "--out", out)
    assert code == 0
    assert "Without block 0 the loss rises most" in " ".join(shown.split())
    assert "What other blocks tell of the weights" in shown
    assert {path.name for path in out.iterdir()} == {"anatomy.json", "report.html"}
    code, shown, _ = run("anatomy", stage_folder("final"), *QUICK, "--studies", "ablation", "--json")
    assert code == 0
    assert json.loads(shown)["kind"] == "anatomy"
    code, _, err = run("anatomy", stage_folder("final"), *QUICK, "--out", out)
    assert code == 2
    assert "not empty" in " ".join(err.split())


def test_unknown_studies_budgets_and_models_are_refused(run, tmp_path) -> None:
    for arguments, said in (
        ((stage_folder("final"), "--studies", "beauty"), "there is no study 'beauty'"),
        ((stage_folder("final"), "--budget", "soon"), "A budget is a positive time"),
        ((tmp_path / "nothing",), "nothing"),
    ):
        code, _, err = run("anatomy", *arguments)
        assert code == 2
        assert said in " ".join(err.split())
