"""What README.md, the guides and the examples tell the reader to type works."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

from contract.configs import ROOT, compose_config
from contract.documents import assert_command_runs, commands, fenced_blocks, make_clone, overrides_of, run_in_clone
from contract.imports import MODULES

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
GUIDES = sorted((ROOT / "docs" / "extend").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_options_page_is_up_to_date() -> None:
    """``python docs/generate_options.py`` writes it."""
    generator = runpy.run_path(str(ROOT / "docs" / "generate_options.py"))
    assert generator["main"](["--check"]) is None


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GUIDES], ids=page_name)
def test_every_training_command_composes(page: Path) -> None:
    """Commands of bash blocks; sweeps compose with their first values. Guides, which add files, are run below."""
    for command in commands(page.read_text(encoding="utf-8")):
        if command.startswith("train.py"):
            overrides = [re.sub(r"^([\w.]+=[^\[{'\",]*),.*", r"\1", word) for word in overrides_of(command)]
            assert compose_config(*(re.sub(r"<[^>]*>", "x", override) for override in overrides)), command


# -- README


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    """In order: later commands read the outputs of earlier ones."""
    clone = make_clone(tmp_path)
    found = [command for command in commands(README) if command.startswith("train.py")]
    assert len(found) > 5
    for command in found:
        assert_command_runs(clone, command)
    assert (clone / "outputs" / "rlhf" / "final_rl_model.pt").is_file()
    for _, snippet in fenced_blocks(README, "python"):
        done = run_in_clone(clone, "-c", snippet)
        assert done.returncode == 0, f"{snippet}\n{done.stderr[-4000:]}"


def test_the_main_commands_work_on_a_bare_machine() -> None:
    """Debian's Python refuses pip outside a virtual environment, so the commands create one."""
    installs = [
        line for _, block in fenced_blocks(README, "bash") for line in block.splitlines() if "pip install" in line
    ]
    assert "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python train.py" in installs
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest -n 2" in installs


# -- guides


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with rlhf/ in it."""
    return make_clone(tmp_path_factory.mktemp("guides"), package=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_every_guide_runs(page: Path, clone: Path) -> None:
    """Blocks with a title are written to that path, then every command runs. Inputs of all guides are trained once."""
    shutil.rmtree(clone / "outputs", ignore_errors=True)
    text = page.read_text(encoding="utf-8")
    for language in ("python", "yaml", "json"):
        for title, content in fenced_blocks(text, language):
            if title:
                path = clone / title
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
    found = commands(text)
    assert found, f"{page_name(page)} has no command"
    for command in found:
        stage = command.removeprefix("train.py stage=")
        output, trained = clone / "outputs" / "rlhf" / stage, clone / "trained" / stage
        if trained.exists():
            shutil.copytree(trained, output)
            continue
        assert_command_runs(clone, command)
        if stage in ("sft", "reward"):
            shutil.copytree(output, trained)


# -- examples


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=page_name)
def test_every_example_runs(example: Path, tmp_path: Path) -> None:
    """With ``--quick``, in a clone, as its header says."""
    clone = make_clone(tmp_path, package=True)
    for path in (clone / "data").glob("*.jsonl"):
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:256]), encoding="utf-8")
    done = run_in_clone(clone, f"examples/{example.name}", "--quick")
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("example", EXAMPLES, ids=page_name)
def test_every_example_says_how_to_run_it(example: Path) -> None:
    assert f"python examples/{example.name}" in example.read_text(encoding="utf-8").split('"""')[1]


# -- metrics and alerts


def test_every_logged_metric_is_documented() -> None:
    """Names in quotes in the modules of the training stages are in a table of README.md or docs/."""
    sources = [file.read_text(encoding="utf-8") for name, file in MODULES.items() if is_training_code(name)]
    prefixes = "objective|policy|critic|loss|response|rewards|logps|throughput|train|val|kto"
    logged = set(re.findall(rf'"((?:{prefixes})/[a-z_]+)"', "".join(sources)))
    assert len(logged) > 20
    assert {name for name in logged if f"`{name}`" not in DOCS} == set()


def is_training_code(name: str) -> bool:
    return name.split(".")[1:2] in (["stage"], ["sft"], ["reward"], ["rl"], ["ppo"], ["grpo"], ["dpo"])


def test_every_alert_is_documented() -> None:
    """With the same keys to change as in the log."""
    from rlhf.metrics.alert_rules import RULES

    for name, rule in RULES.items():
        rows = [line for line in DOCS.splitlines() if line.startswith(f"| `{name}` |")]
        assert rows, f"no table has a row for {name}"
        keys = set(re.findall(r"(?:stage|trainer)\.[a-z_.]+[a-z]", rule.change))
        assert any(keys <= set(re.findall(r"(?:stage|trainer)\.[a-z_.]+[a-z]", row)) for row in rows), name
