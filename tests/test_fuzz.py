"""Arbitrary rows, files, overrides and exports are accepted, or rejected with a message: there is no other error.

``FUZZ_EXAMPLES=10000 pytest tests/test_fuzz.py`` tries more examples of each.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contract.configs import compose_config, to_dict
from rlhf import load_model
from rlhf.config import check_choices, check_values
from rlhf.data import Demonstration, Preference, Prompt, Rating, UnpairedPreference
from rlhf.data.files import EXTENSIONS
from rlhf.data.parser import RecordParser
from rlhf.data.reading import RecordReader
from rlhf.data.records import FIELDS
from rlhf.errors import explain
from rlhf.export import save_result
from rlhf.stage import Result

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
# Fixtures are shared by all examples: no example changes them. Without FUZZ_EXAMPLES, the examples are always the same.
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "human"]), "content": SCALARS}),
    max_size=4,
)
NAMES = st.sampled_from([*FIELDS, "conversations", "instruction", "input", "output"])
ROWS = st.dictionaries(NAMES | st.text(max_size=8), st.text(max_size=20) | MESSAGES | VALUES, max_size=6)


@pytest.fixture(scope="session")
def architecture() -> str:
    """The format of an export is the same for every architecture."""
    return "transformer"


def is_explained(call: Callable[[], object]) -> bool:
    """Return whether a call succeeds or raises an error that ``train.py`` shows as a message."""
    try:
        call()
    except Exception as error:
        if not explain(error):
            raise
    return True


# Records and files


@FUZZ
@given(ROWS, st.sampled_from([Demonstration, Preference, Rating, UnpairedPreference, Prompt]))
def test_a_row_is_a_record_or_an_error(row: dict[str, Any], record_type: Any) -> None:
    assert is_explained(lambda: RecordParser().parse(row, record_type))


@FUZZ
@given(
    st.sampled_from(EXTENSIONS),
    st.binary(max_size=200) | st.lists(ROWS, max_size=4) | st.text(max_size=200),
)
def test_a_file_is_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, extension: str, content: Any) -> None:
    path = tmp_path_factory.mktemp("file") / f"rows{extension}"
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    reader = RecordReader(RecordParser(), on_error="skip")
    assert is_explained(lambda: reader.read(str(path), "train", (Demonstration,)))


# Configurations


def _keys(node: Any, path: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [path]
    return [key for name, value in node.items() for key in _keys(value, f"{path}.{name}" if path else name)]


STAGES = ("sft", "reward", "ppo", "grpo", "dpo", "collect", "evaluate")
KEYS = {stage: _keys(to_dict(compose_config(f"stage={stage}"))) for stage in STAGES}
LITERALS = st.sampled_from(
    ["null", "true", "-1", "0", "1e999", "nan", "[]", "{}", "[1,2]", "{a: 1}", "''", "abc", "${x}"]
)


@FUZZ
@given(st.sampled_from(STAGES), st.data())
def test_a_configuration_is_accepted_or_rejected(stage: str, data: st.DataObject) -> None:
    keys = st.sampled_from(KEYS[stage]) | st.text(max_size=10)
    values = LITERALS | st.integers().map(str) | st.floats().map(str) | st.text(max_size=10)
    overrides = data.draw(st.lists(st.tuples(keys, values).map("=".join) | st.text(max_size=12), max_size=3))

    def check() -> None:
        cfg = compose_config(f"stage={stage}", *overrides)
        check_choices(cfg)
        check_values(cfg)

    assert is_explained(check)


# Exports


@pytest.fixture
def export(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> tuple[Path, bytes]:
    """The path of an export, and its bytes."""
    path = tmp_path / "sft_final.pt"
    save_result(Result(lm, tokenizer), path, {"stage": "sft"})
    return path, path.read_bytes()


@FUZZ
@given(st.data())
def test_a_damaged_export_is_rejected(export: tuple[Path, bytes], data: st.DataObject) -> None:
    path, original = export
    content = bytearray(original)
    position = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
    if damage == "flip":
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "cut":
        del content[position:]
    elif damage == "insert":
        content[position:position] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        content[position : position + 64] = bytes(min(64, len(content) - position))
    path.with_name("damaged.pt").write_bytes(bytes(content))
    assert is_explained(lambda: load_model(str(path.with_name("damaged.pt")), device="cpu"))


@FUZZ
@given(st.data())
def test_an_export_with_other_content_is_rejected(export: tuple[Path, bytes], data: st.DataObject) -> None:
    """One entry is replaced or removed: of the file, of the model's configuration, or of the tokenizer's files."""
    path, _ = export
    content = torch.load(path, weights_only=True)
    entry = data.draw(st.sampled_from(sorted(content)))
    value = data.draw(VALUES)
    if entry == "config":
        config = json.loads(content["config"])
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(SCALARS)
        content["config"] = json.dumps(config)
    elif entry in ("tokenizer", "weights") and data.draw(st.booleans()):
        content[entry][data.draw(st.sampled_from(sorted(content[entry])))] = value
    elif data.draw(st.booleans()):
        content[entry] = value
    else:
        del content[entry]
    torch.save(content, path.with_name("changed.pt"))
    assert is_explained(lambda: load_model(str(path.with_name("changed.pt")), device="cpu"))
