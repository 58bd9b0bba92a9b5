"""Settings that the regression tests of known pitfalls share."""

# The stages whose training differs; GRPO shares PPO's code, and KTO shares DPO's.
STAGES = ("sft", "reward", "ppo", "dpo")
# With an AdamW epsilon of 1, a step is close to learning rate x gradient. The usual epsilon would amplify the rounding
# noise of tiny gradients to full steps.
ONE_STEP = {"eps": 1.0, "learning_rate": 1.0}
PLAIN_SCORES = {"subtract_mean": False, "scale_by_std": False, "clip": None, "missing_eos_penalty": 0.0}
