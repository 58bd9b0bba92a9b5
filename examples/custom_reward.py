"""A custom reward function: PPO learns to write summaries of five words.

The function ``five_words`` is all that PPO needs. The script trains a small model on the bundled demonstrations, then
runs PPO with the function as its reward, and prints responses of both models. Results are in outputs/five_words.

    python examples/custom_reward.py            # about a minute on two CPU cores
    python examples/custom_reward.py --quick    # a few steps of each stage
"""

import subprocess
import sys

from rlhf.export import load_model

RUN = "run=five_words"
SHORT = {
    "sft": ["trainer.max_epochs=1", "trainer.limit_train_batches=120"],
    "ppo": ["trainer.limit_train_batches=48", "stage.sampling.max_new_tokens=24", "trainer.limit_val_batches=1"],
}
QUICK = ["trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "data.max_rows=64"]
PROMPT = "The gates open on Sunday. Many people asked for details. Many look forward to the parade in Hampden."


def five_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Return 0 for a response of five words, and minus one for every word more or less.

    Args:
        prompts: The prompts as they are in the data.
        responses: One response per prompt.
    """
    return [-abs(len(response.split()) - 5) for response in responses]


def train(*overrides: str) -> None:
    """Run one stage, exactly as on the command line."""
    subprocess.run([sys.executable, "train.py", RUN, "overwrite=true", *overrides], check=True)


def main() -> None:
    quick = QUICK if "--quick" in sys.argv else []
    train("stage=sft", *SHORT["sft"], *quick)
    train("stage=ppo", "reward=python", f"reward.path={__file__}:five_words", *SHORT["ppo"], *quick)
    for name in ("sft", "ppo"):
        model, tokenizer, _ = load_model(name, run="five_words", device="cpu")
        messages = [{"role": "user", "content": PROMPT}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        print(f"{name}: {tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
