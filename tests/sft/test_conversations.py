"""``data.loss_on=assistant``: the loss, its gradient and its weights are those of all assistant messages."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F

from harness import EXACT, NO_UPDATE, TINY_DATA, TinyRun, run_train
from rlhf.callbacks import PreflightChecks, PreflightOnly

TURN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>\n{% endfor %}"
CHATML = TURN + "{% if add_generation_prompt %}[assistant]{% endif %}"
TALKS = [
    ["The bridge opens.", "May", "It rains.", "90 euros", "A", "Monday"],
    ["Who won?", "The mayor opened it."],
    ["See", "B b", "May", "children, weather"],
    ["B b", "In short, it rains.", "Who won?", "Nadia Falk"],
]
PLAIN = {"eps": 1.0, "learning_rate": 1.0}  # The first step of AdamW is then close to the gradient.


@pytest.fixture(scope="session")
def architecture() -> str:
    """The architecture makes no difference here: one is enough."""
    return "transformer"


def rows(talks: list[list[str]]) -> list[dict[str, Any]]:
    """Rows of conversations, the first of which has a system message."""
    system = [{"role": "system", "content": "Be brief."}]
    return [
        {
            "messages": [
                *(system if number == 0 else []),
                *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)),
            ]
        }
        for number, talk in enumerate(talks)
    ]


def pieces(messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """The texts of a conversation with ``CHATML``, and whether they are learned."""
    found: list[tuple[str, bool]] = []
    for message in messages:
        found.append((f"[{message['role']}]", False))
        found.append((f"{message['content']}<eos>", message["role"] == "assistant"))
        found.append(("\n", False))
    return found[:-1]


def losses(tiny_run: TinyRun, lm: Any, row: dict[str, Any]) -> torch.Tensor:
    """Negative log-likelihood of each token to learn of a row, by the bare model."""
    ids: list[int] = []
    learned: list[bool] = []
    for text, is_learned in pieces(row["messages"]):
        tokens = tiny_run.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        learned += [is_learned] * len(tokens)
    logits = lm(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[torch.tensor(learned[1:])]


class Gradients(lightning.Callback):
    """Records the gradients of the policy."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.values = [parameter.grad.clone() for parameter in module.policy.lm.parameters()]


@pytest.fixture
def chatml(tiny_run: TinyRun) -> TinyRun:
    """Runs with the template ``CHATML``."""
    tiny_run.tokenizer.chat_template = CHATML
    tiny_run.data_keys.update(loss_on="assistant", max_length=128)
    return tiny_run


def data(tiny_run: TinyRun, **keys: Any) -> dict[str, Any]:
    """Keywords of a data module that reads ``TALKS``, by default in one batch."""
    return {"train": tiny_run.write("talks", rows(TALKS)), **keys}


def test_the_gradient_is_that_of_the_mean_over_all_assistant_messages(chatml: TinyRun) -> None:
    """Expected: one sequence at a time through the bare model; validation averages over the same tokens."""
    val = chatml.write("val", rows(TALKS))
    gradients = Gradients()
    run = chatml.build(
        "sft", data=data(chatml, val=val, eval_batch_size=3), callbacks=[gradients], learning_rate=NO_UPDATE
    )
    run.fit()
    expected = torch.cat([losses(chatml, chatml.lm, row) for row in rows(TALKS)])
    assert run.curve("train/loss") == pytest.approx([expected.mean().item()], rel=1e-5)
    assert run.curve("val/loss")[-1] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert run.batches[0].loss_terms == len(expected)
    parameters = list(chatml.lm.parameters())
    for found, wanted in zip(gradients.values, torch.autograd.grad(expected.mean(), parameters), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_equal_one_batch(chatml: TinyRun) -> None:
    """Four batches are weighted by their numbers of learned tokens."""
    large = chatml.train("sft", data=data(chatml), trainer={"max_steps": 1}, **PLAIN)
    small = chatml.train(
        "sft", data=data(chatml, batch_size=1), trainer={"max_steps": 1, "accumulate_grad_batches": 4}, **PLAIN
    )
    terms = [batch.loss_terms for batch in small.batches]
    assert len(set(terms)) > 1
    assert sum(terms) == large.batches[0].loss_terms
    torch.testing.assert_close(small.module.policy.state_dict(), large.module.policy.state_dict())


def test_single_turns_train_as_with_the_response(tiny_run: TinyRun) -> None:
    """To the last bit."""
    one, other = (tiny_run.train("sft", data={"loss_on": loss_on}) for loss_on in ("response", "assistant"))
    torch.testing.assert_close(one.weights, other.weights, **EXACT)


def test_the_response_is_the_last_message_of_a_conversation(chatml: TinyRun) -> None:
    """Its tokens are the last ones of the loss of all assistant messages."""
    run = chatml.train("sft", data=data(chatml, loss_on="response"))
    counts = [len(chatml.tokenizer(f"{talk[-1]}<eos>", add_special_tokens=False)["input_ids"]) for talk in TALKS]
    expected = [losses(chatml, chatml.lm, row)[-count:] for row, count in zip(rows(TALKS), counts, strict=True)]
    assert run.batches[0].loss_terms == sum(counts)
    assert run.curve("train/loss") == pytest.approx([torch.cat(expected).mean().item()], rel=1e-5)


def test_preflight_checks_pass(chatml: TinyRun) -> None:
    """Among them, padding has no effect, and accumulation equals the larger batch."""
    run = chatml.build("sft", data=data(chatml), callbacks=[PreflightChecks(chatml.folder, {}, only=True)])
    with pytest.raises(PreflightOnly):
        run.fit()


def test_a_template_that_changes_earlier_messages_is_rejected(tiny_run: TinyRun, repo: Path, tmp_path: Path) -> None:
    """As a message of the command: the template removes the reasoning of earlier messages."""
    tokenizer = tiny_run.tokenizer
    tokenizer.chat_template = CHATML.replace(
        "m['content']", "m['content'] if loop.last else m['content'].split('</think>')[-1]"
    )
    tiny_run.lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = tiny_run.write("reasoning", rows([["Q", "<think>R</think>A", "Q", "A"]] * 2))
    overrides = ["model=pretrained", f"model.path={tmp_path / 'model'}", "data=jsonl", f"data.train={path}"]
    data = [override for override in TINY_DATA if not override.startswith("model")]
    done = run_train(repo, tmp_path / "root", "stage=sft", *data, *overrides, "data.loss_on=assistant", check=False)
    assert done.returncode == 2
    assert "data.loss_on=assistant: the tokenizer's chat template changes the text of message 3" in done.stderr
    assert "Set data.loss_on=response" in done.stderr
    assert "Traceback" not in done.stderr
