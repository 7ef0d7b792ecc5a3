"""What is said of the commands is true: their help, the commands in the documents, CONTRIBUTING."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from tools import ROOT

COMMANDS = [
    "bench_stages", "bench_step", "coverage", "cuda_lowering", "demo", "explained", "figures",
    "gpu_check",
    "inspect_pictures",
    "make_data_subset", "op_rules", "options_page", "reproduce", "perf.perf_gate", "perf.history",
    "bench.compile_time", "bench.optimizer_share", "bench.projections", "bench.step_profile",
    "bench.time_to_accuracy", "bench.what_pays", "trust",
]  # fmt: skip
TEXTS = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"),
    *ROOT.glob("tools/**/*.py"), ROOT / "tools/README.md", ROOT / "Makefile",
    *(ROOT / ".github").rglob("*.*"),
]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command_and_has_the_options_of_its_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "op_rules":
        pytest.importorskip("expecttest", reason="torch's operator samples import it")
    main = "tools." + name
    package = importlib.util.find_spec(main)
    assert package is not None
    module = importlib.import_module(
        f"{main}.__main__" if package.submodule_search_locations else main
    )
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m {main} ")
    options = set(re.findall(r"^  (--[a-z-]+)|, (--[a-z-]+)", text.split("options:")[1], re.M))
    known = {a or b for a, b in options}
    for line in re.findall(rf"^.*python -m {main} .*$", module.__doc__ or "", re.M):
        given = re.findall(r"--[a-z-]+", line.partition("#")[0])
        assert set(given) <= known, line


def test_every_command_that_is_quoted_exists() -> None:
    quoted: dict[str, Path] = {}
    for path in TEXTS:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            quoted |= dict.fromkeys(re.findall(r"python -m tools\.([a-z_.]*[a-z_])", text), path)
            assert not re.search(r"python tools/", text), path
    missing = {c: p for c, p in quoted.items() if c not in COMMANDS}
    assert not missing and set(COMMANDS) - quoted.keys() <= {
        "bench.what_pays", "figures", "bench_stages",  # under torchrun
    }  # fmt: skip


def test_the_list_of_commands_is_whole() -> None:
    text = (ROOT / "tools" / "README.md").read_text()
    assert all(f"`{name}" in text for name in COMMANDS)
    main = re.compile(r"^if __name__ == ", re.M)
    files = [p for p in (ROOT / "tools").rglob("*.py") if main.search(p.read_text())]
    names = {".".join(p.relative_to(ROOT / "tools").with_suffix("").parts) for p in files}
    assert {n.removesuffix(".__main__") for n in names} == set(COMMANDS)


def test_contributing_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).is_file(), target
    for test, path in re.findall(r"`(test_\w+)` in\n?\s*\[`[^`]+`\]\(([^)]+)\)", text):
        assert f"def {test}(" in (ROOT / path).read_text(), test
    assert len(re.findall(r"^- Copy from:", text, re.M)) == 4
    assert len(re.findall(r"^- Test to copy from: `test_", text, re.M)) == 4


@pytest.mark.parametrize("name", ["bug", "feature", "wrong-gradient"])
def test_issue_forms_are_forms(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert part["attributes"].get("label") or part["attributes"].get("value")


def test_the_code_of_the_wrong_gradient_form_runs(capsys: pytest.CaptureFixture[str]) -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/wrong-gradient.yml").read_text())
    (code,) = (p["attributes"]["value"] for p in form["body"] if p.get("id") == "code")
    exec(compile(code, "wrong-gradient.yml", "exec"), {})
    errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) == 4 and max(errors) < 1e-12


def test_pre_commit_needs_nothing_from_elsewhere() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert {hook["entry"].split()[0] for hook in hooks} == {".venv/bin/ruff", ".venv/bin/mypy"}
