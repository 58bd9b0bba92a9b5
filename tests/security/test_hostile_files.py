"""Hostile files are refused or have no effect: nothing in them runs, and nothing is written.

The cases are those of the table in docs/security.md. After each, the canary must be empty.
"""

import builtins
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from security import hostile
from security.hostile import Workshop
from transformers import PreTrainedTokenizerFast

from harness import DEMONSTRATIONS
from rlhf import load_model
from rlhf.errors import UserError
from rlhf.export import open_model_source
from rlhf.sft import SFTDataModule
from rlhf.tokenizer import probe

HUGE = 4194304


@pytest.fixture
def work(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Workshop]:
    """The builders, and the check of the canary at the end."""
    canary = tmp_path / "canary"
    canary.mkdir()
    yield Workshop(tmp_path / "hostile", canary, tokenizer)
    assert not list(canary.iterdir()), "code of a hostile file has run, or a file was written"


@pytest.fixture(autouse=True)
def _no_question_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, transformers would ask whether to run the code of a model."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(probe, "SECONDS", 2)


# Ways in


def as_policy(path: Path) -> None:
    source = open_model_source(str(path))
    source.language_model(source.tokenizer(()))


def as_reward_model(path: Path) -> None:
    source = open_model_source(str(path))
    source.scalar_model(source.tokenizer(()))


def by_load_model(path: Path) -> None:
    load_model(str(path), device="cpu")


def as_template(path: Path) -> None:
    """Encode data with the tokenizer of a model, as every stage does."""
    (path.parent / "data.jsonl").write_text("\n".join(map(json.dumps, DEMONSTRATIONS)))
    tokenizer = open_model_source(str(path)).tokenizer(())
    SFTDataModule(train=str(path.parent / "data.jsonl"), tokenizer=tokenizer).encoded("train")


def with_variable(way: Callable[[Path], None]) -> Callable[[Path], None]:
    """The variable makes torch.load run pickles wherever a program does not say otherwise."""

    def enter(path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
            way(path)

    return enter


def check_outcome(way: Callable[[Path], None], path: Path, message: str | None) -> None:
    """Open a hostile file. ``message``: of the error; None: the hostile part has no effect."""
    before = {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")}
    if message is None:
        way(path)
    else:
        with pytest.raises(UserError, match=message) as error:
            way(path)
        assert error.value.hint, "the message says how to go on"
    after = {file: file.stat().st_mtime_ns for file in path.parent.rglob("*") if file.name != "data.jsonl"}
    assert after == before, "files were written"


NOT_RUN = r"Python objects, which could run code\. Nothing in it was run"

PICKLES: dict[str, tuple[Callable[[Path], None], Callable[[Workshop], Path]]] = {
    "whole file as policy": (as_policy, hostile.whole_file),
    "whole file as reward model": (as_reward_model, hostile.whole_file),
    "in the provenance of an export": (as_policy, hostile.within_an_export),
    "among the weights of an export": (as_policy, hostile.among_the_weights),
    "in an export as reward model": (as_reward_model, hostile.within_an_export),
    "plain pickle": (as_policy, hostile.plain_pickle),
    "legacy format": (as_policy, hostile.legacy_format),
    "by load_model": (by_load_model, hostile.whole_file),
    "checkpoint": (as_policy, lambda work: hostile.whole_file(work, "last.ckpt")),
    "legacy checkpoint": (as_policy, lambda work: hostile.legacy_format(work, "last.ckpt")),
    "with the variable of torch": (with_variable(as_policy), hostile.whole_file),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_is_refused(work: Workshop, case: str) -> None:
    way, build = PICKLES[case]
    check_outcome(
        way, build(work), r"legacy format of torch\.save" if "legacy" in case or case == "plain pickle" else NOT_RUN
    )


@pytest.mark.parametrize("way", [as_policy, as_reward_model, with_variable(as_policy)])
def test_weights_in_a_pickle_are_refused(work: Workshop, way: Callable[[Path], None]) -> None:
    """``pytorch_model.bin`` is opened, but only tensors in it."""
    check_outcome(way, work.binary(), r"hostile: could not load a (language|reward) model")


# Data in a file is never more than data


EVIL = {"_target_": "os.system", "_class_path": "os.system", "command": "touch canary/ran"}
DATA: dict[str, tuple[Callable[[Path], None], Callable[[Workshop], Path], str | None]] = {
    "_target_ in the provenance": (
        as_policy,
        lambda work: work.export(lambda content: content.update(provenance=json.dumps({"config": EVIL}))),
        None,
    ),
    "_target_ in the configuration": (as_policy, lambda work: work.configured(**EVIL), None),
    "_target_ in the head": (
        as_reward_model,
        lambda work: work.export(lambda content: content["head"].update(EVIL), scalar=True),
        r"could not load a reward head .*_target_",
    ),
    "auto_map of a known type in an export": (
        as_policy,
        lambda work: work.configured(auto_map={"AutoModelForCausalLM": "evil.Evil"}),
        None,
    ),
    "auto_map of an unknown type in an export": (
        as_policy,
        lambda work: work.configured(auto_map={"AutoConfig": "evil.Evil"}, model_type="evil"),
        r"could not load a model configuration",
    ),
    "code among the tokenizer files": (
        as_policy,
        lambda work: work.tokenizer_file("evil.py", work.evil_module("evil.py")["evil.py"]),
        r"a file named 'evil\.py'",
    ),
    "code among the tokenizer files, by load_model": (
        by_load_model,
        lambda work: work.tokenizer_file("evil.py", work.evil_module("evil.py")["evil.py"]),
        r"a file named 'evil\.py'",
    ),
    "auto_map of a tokenizer in an export": (
        by_load_model,
        lambda work: work.tokenizer_file(
            "tokenizer_config.json",
            json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}),
        ),
        r"its tokenizer cannot be opened",
    ),
    "auto_map of a configuration": (
        as_policy,
        lambda work: work.remote_code("AutoConfig", model_type="evil"),
        r"could not load a tokenizer|could not load a language model",
    ),
    "auto_map of a model": (
        as_policy,
        lambda work: work.remote_code("AutoModelForCausalLM", model_type="evil"),
        r"could not load a",
    ),
    "auto_map of a model of a known type": (as_policy, lambda work: work.remote_code("AutoModelForCausalLM"), None),
    "auto_map of a tokenizer": (
        as_policy,
        lambda work: work.remote_code("AutoTokenizer", tokenizer_class="Evil"),
        r"could not load a tokenizer",
    ),
    "auto_map of a reward model": (
        as_reward_model,
        lambda work: work.remote_code("AutoModelForSequenceClassification", model_type="evil"),
        r"could not load a",
    ),
    "custom_generate": (as_policy, lambda work: work.hf(work.evil_module("custom_generate/generate.py")), None),
    "adapter of another file": (
        as_policy,
        lambda work: work.hf({"adapter_config.json": {"base_model_name_or_path": "/etc/passwd", "peft_type": "LORA"}}),
        r"contains an adapter of peft",
    ),
    "kernel in an export": (
        as_policy,
        lambda work: work.configured(_attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
        r"attn_implementation .* must be one of sdpa, eager, got 'evil/kernel'",
    ),
    "kernel in a folder": (
        as_policy,
        lambda work: work.hf(attn_implementation="evil/kernel"),
        r"attn_implementation .* must be one of sdpa, eager, got 'evil/kernel'",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_code_that_a_file_names_is_not_run(work: Workshop, case: str) -> None:
    way, build, message = DATA[case]
    check_outcome(way, build(work), message)


# Paths


@pytest.mark.parametrize("way", [as_policy, by_load_model])
@pytest.mark.parametrize("kind", ["traversal", "absolute", "scorer", "drive", "null"])
def test_no_file_is_written_elsewhere(work: Workshop, way: Callable[[Path], None], kind: str) -> None:
    """A tokenizer file could otherwise replace any file, such as a Python file that runs later."""
    names = {
        "traversal": "../" * 20 + str(work.canary / "traversal").lstrip("/"),
        "absolute": str(work.canary / "absolute"),
        "scorer": str(work.canary / "my_scorer.py"),
        "drive": "C:\\tokenizer.json",
        "null": "tokenizer.json\0.py",
    }
    check_outcome(way, work.tokenizer_file(names[kind]), r"Only plain names of tokenizer files are allowed")


def test_a_symbolic_link_is_not_followed_to_write(work: Workshop) -> None:
    """A folder may contain links. Opening it only reads."""
    folder = work.hf()
    target = work.folder.parent / "elsewhere.json"
    (folder / "tokenizer.json").rename(target)
    (folder / "tokenizer.json").symlink_to(target)
    check_outcome(as_policy, folder, None)


# Sizes


SIZES: dict[str, tuple[Callable[[Path], None], Callable[[Workshop], Path], str]] = {
    "hidden size": (as_policy, lambda work: work.configured(hidden_size=HUGE), r"do not fit the model configuration"),
    "number of layers": (
        as_policy,
        lambda work: work.configured(num_hidden_layers=10**9),
        r"has 1000000000 layers, but there are only \d+ weights",
    ),
    "number of layers of a folder": (
        as_policy,
        lambda work: work.hf(num_hidden_layers=10**9),
        r"has 1000000000 layers, but there are only \d+ weights",
    ),
    "reward head": (
        as_reward_model,
        lambda work: work.export(lambda content: content["head"].update(hidden_dim=10**12, num_layers=2), scalar=True),
        r"head is missing|do not fit",
    ),
    "tensor with stride 0": (
        as_policy,
        lambda work: hostile.fake_tensor(work, torch.zeros(1).expand(300, HUGE)),
        r"has fewer numbers than its shape says",
    ),
    "tensor without storage": (
        as_policy,
        lambda work: hostile.fake_tensor(work, torch.zeros(300, HUGE, device="meta")),
        r"must be a dense tensor",
    ),
    "sparse tensor": (
        as_policy,
        lambda work: hostile.fake_tensor(work, torch.zeros(300, HUGE, layout=torch.sparse_coo)),
        r"must be a dense tensor",
    ),
    "adapter of itself": (as_policy, hostile.recursive_adapter, r"contains an adapter itself"),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_file_cannot_take_all_memory(work: Workshop, case: str) -> None:
    """Sizes are compared with the weights before memory is allocated."""
    way, build, message = SIZES[case]
    check_outcome(way, build(work), message)


# Templates and regular expressions


LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
SHELL = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch ran') }}"
TEMPLATES = {
    "endless loop": (LOOPS, r"it takes more than 2 seconds"),
    "enormous text": ("{{ messages[0]['content'] * 10**6 }}", r"it writes \d+ characters for a short conversation"),
    "enormous number": ("{{ 'a' * 10**11 }}", r"it needs more than 8 GB of memory"),
    "constant": ("{{ bos_token }}Hello", r"it writes the same text for different messages"),
    "shell": (SHELL, r"chat template does not support .* unsafe"),
}


@pytest.mark.parametrize(("case", "source"), [*((case, "folder") for case in TEMPLATES), ("shell", "export")])
def test_a_chat_template_cannot_hang_a_run(work: Workshop, case: str, source: str) -> None:
    template, message = TEMPLATES[case]
    path = (
        work.hf({"chat_template.jinja": template})
        if source == "folder"
        else work.tokenizer_file("chat_template.jinja", template)
    )
    check_outcome(as_template, path, message + r"[^$]*data\.template=")


def test_a_template_that_waits_for_its_time_is_interrupted(work: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It behaves while it is tried out, and loops at a word of the data."""
    monkeypatch.setattr("rlhf.data.encode.RENDER_SECONDS", 1)
    patient = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if 'Nadia' in messages[0]['content'] %}"
    path = work.hf({"chat_template.jinja": f"{patient}{LOOPS}{{% endif %}}"})
    check_outcome(as_template, path, r"chat template takes more than 1 seconds for one conversation")


def with_pattern(work: Workshop, pattern: str) -> Path:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return work.hf({"tokenizer.json": {"pre_tokenizer": split}})


@pytest.mark.parametrize(
    ("pattern", "problem"), [(r"(a+)+$", "fails"), (r"(?:a|a|b){1,19}[^ab!]", "takes more than 2 seconds")]
)
def test_a_regular_expression_cannot_hang_a_run(work: Workshop, pattern: str, problem: str) -> None:
    """The expression takes exponential time, so it either gives up or does not end."""
    check_outcome(as_policy, with_pattern(work, pattern), rf"the tokenizer cannot be used: encoding .* {problem}")


def test_a_tokenizer_that_fails_on_the_data_is_reported(work: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the texts of the trial do not show, such as a failure that only some text causes."""
    monkeypatch.setattr("rlhf.models.sources.check_tokenizer", lambda *_: None)
    rows = [{"prompt": "a" * 100 + "!", "completion": "a"}]
    monkeypatch.setattr(sys.modules[__name__], "DEMONSTRATIONS", rows)
    check_outcome(as_template, with_pattern(work, r"(a+)+$"), r"cannot encode a text of the data \(.*retry-limit")
