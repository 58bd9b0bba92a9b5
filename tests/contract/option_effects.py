"""The overrides that tests/contract/test_option_effects.py sets: one for every option that training depends on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effect:
    """An override that changes the trained weights, or that is rejected with an error that names its key.

    Args:
        stage: Stage that is trained.
        override: The override. ``{rows}`` stands for the file of records.
        given: Overrides that both runs have, the one with ``override`` and the one without.
    """

    stage: str
    override: str
    given: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.override.split("=")[0]


TARGET = "stage.kl.target_per_sequence=0.001"
TWO_LAYERS = "stage.num_layers=2"
DEMONSTRATIONS = "data.demonstrations={rows}"
MAMBA = ("model=mamba", "model.hidden_size=16", "model.num_layers=1", "model.head_dim=16", "model.state_size=4")

# Options of every stage, tried with SFT.
OPTIMIZER = [
    Effect("sft", "stage.learning_rate=1e-2"),
    Effect("sft", "stage.weight_decay=0.5"),
    Effect("sft", "stage.betas=[0.5,0.6]"),
    Effect("sft", "stage.eps=1e-2"),
    Effect("sft", "stage.schedule=linear"),
    Effect("sft", "stage.warmup_ratio=0.9"),
]
DATA = [
    Effect("sft", "data.val_fraction=0.5"),
    Effect("sft", "data.template='{{prompt}} TL;DR:'"),
    Effect("sft", "data.max_length=12"),
    Effect("sft", "data.max_rows=4"),
    Effect("sft", "data.batch_size=4"),
    Effect("sft", "data.seed=5", ("data.batch_size=4",)),
]
TRANSFORMER = [
    Effect("sft", f"model.{setting}")
    for setting in (
        "hidden_size=32 num_layers=2 num_heads=1 intermediate_size=32 vocab_size=310 "
        "initializer_range=0.1 rope_theta=10.0"
    ).split()
]
MAMBA_MODEL = [
    Effect("sft", f"model.{setting}", MAMBA)
    for setting in "hidden_size=32 num_layers=2 head_dim=8 state_size=8 vocab_size=310 initializer_range=0.1".split()
]
SFT = [Effect("sft", "data.loss_on=all")]
REWARD = [
    Effect("reward", "stage.input_dim=7"),
    Effect("reward", "stage.hidden_dim=16", (TWO_LAYERS,)),
    Effect("reward", TWO_LAYERS),
    Effect("reward", "stage.num_heads=3"),
    Effect("reward", "stage.label_smoothing=0.2"),
    Effect("reward", "stage.centering_coef=0.5"),
    Effect("reward", DEMONSTRATIONS),
    Effect("reward", "data.demonstration_rows=2", (DEMONSTRATIONS,)),
]
ON_POLICY = [
    Effect("ppo", "stage.sampling.max_new_tokens=4"),
    Effect("ppo", "stage.sampling.temperature=1.0"),
    Effect("ppo", "stage.sampling.top_k=3"),
    Effect("ppo", "stage.sampling.top_p=0.5"),
    Effect("ppo", "stage.sampling.stop_tokens=[e]"),
    Effect("ppo", "stage.scores.subtract_mean=false"),
    Effect("ppo", "stage.scores.scale_by_std=false"),
    Effect("ppo", "stage.scores.clip=0.1"),
    Effect("ppo", "stage.scores.missing_eos_penalty=3.0"),
    Effect("ppo", "stage.scores.missing_eos=replace"),
    Effect("ppo", "stage.kl_coef=1.0"),
    Effect("ppo", "stage.kl.apply_to=loss", ("stage.kl.estimator=k3",)),
    Effect("ppo", "stage.kl.estimator=full"),
    Effect("ppo", TARGET),
    Effect("ppo", "stage.kl.horizon=10", (TARGET,)),
    Effect("ppo", "stage.clip_range=0.001"),
    Effect("ppo", "stage.clip_range_high=0.001"),
    Effect("ppo", "stage.limits.dual_clip=1.0001"),
    Effect("ppo", "stage.limits.stop_kl_per_token=1e-6"),
    Effect("ppo", "stage.limits.skip_ratio=1.00001"),
    Effect("ppo", "stage.entropy_coef=0.1"),
    Effect("ppo", "stage.loss_reduction=sequence_mean"),
    Effect("ppo", "stage.loss_reduction=sequence_sum"),
    Effect("ppo", "stage.rollout_batch_size=3"),
    Effect("ppo", "stage.num_generations=2"),
    Effect("ppo", "stage.ppo_epochs=1"),
    Effect("ppo", "stage.minibatch_size=8"),
    Effect("ppo", "reward=exact_match"),
    Effect("ppo", "reward.uncertainty_penalty=1.0"),
]
PPO = [
    Effect("ppo", "stage.gamma=0.5"),
    Effect("ppo", "stage.gae_lambda=0.1"),
    Effect("ppo", "stage.whiten_rewards=true"),
    Effect("ppo", "stage.whiten_advantages=false"),
    Effect("ppo", "stage.value_clip_range=0.001"),
    Effect("ppo", "stage.value_coef=10"),
    Effect("ppo", "stage.critic=shared"),
    Effect("ppo", "stage.critic_init=sft"),
    Effect("ppo", "stage.critic_warmup=1"),
    Effect("ppo", "stage.critic_learning_rate=1e-2"),
    Effect("ppo", "stage.obs_dim=7"),
    Effect("ppo", "stage.action_dim=7"),
]
GRPO = [
    Effect("grpo", "advantage=rloo"),
    Effect("grpo", "advantage=dr_grpo"),
    Effect("grpo", "advantage=gae"),
    Effect("grpo", "advantage=reinforce_pp"),
    Effect("grpo", "advantage=reinforce_pp_baseline"),
    Effect("grpo", "stage.advantage.scale_by_std=false"),
    Effect("grpo", "stage.advantage.gamma=0.5", ("advantage=reinforce_pp",)),
    Effect("grpo", "stage.num_generations=2"),
]
DPO = [
    *(Effect("dpo", f"loss={loss}") for loss in "ipo hinge conservative robust simpo orpo kto".split()),
    Effect("dpo", "stage.beta=0.03"),
    Effect("dpo", "stage.loss.label_smoothing=0.3", ("loss=conservative",)),
    Effect("dpo", "stage.loss.label_smoothing=0.3", ("loss=robust",)),
    Effect("dpo", "stage.loss.target_margin=5.0", ("loss=simpo",)),
    Effect("dpo", "stage.loss.desirable_weight=3.0", ("loss=kto",)),
    Effect("dpo", "stage.loss.undesirable_weight=3.0", ("loss=kto",)),
    Effect("dpo", "stage.reference_free=true"),
    Effect("dpo", "stage.length_normalized=true"),
    Effect("dpo", "stage.sft_coef=1.0"),
]
EFFECTS = [*OPTIMIZER, *DATA, *TRANSFORMER, *MAMBA_MODEL, *SFT, *REWARD, *ON_POLICY, *PPO, *GRPO, *DPO]

# Pattern of keys -> why they are not in the table.
ELSEWHERE = {
    "stage.policy": "an input: tests/test_train.py",
    "stage.reward_model": "an input: tests/test_train.py",
    "stage.output": "a directory",
    "stage.samples": "only shown: tests/sft, tests/rl, tests/dpo",
    "stage.sample_interval": "only shown: tests/rl",
    "stage.kl.monitor": "tests/rl: the weights are the same",
    "stage.max_new_tokens": "of the samples that are shown",
    "stage.sampler.stop_interval": "speed: tests/sampling/test_sampler.py shows equal responses",
    "stage.sampler.batch_size": "memory: tests/sampling/test_lean.py shows equal responses",
    "stage.gradient_checkpointing": "memory: tests/models/test_checkpointing.py shows equal gradients",
    "stage.on_nonfinite": "needs a value that is not finite: tests/test_nonfinite.py shows what it changes",
    "stage.max_nonfinite_steps": "needs values that are not finite: tests/test_nonfinite.py shows what it changes",
    "stage.on_out_of_memory": "needs too little memory: tests/test_memory.py shows equal weights",
    "stage.precompute_ref_logprobs": "speed: tests/dpo/test_ref_logprobs.py shows equal weights",
    "stage.ref_logprobs_cache": "speed: tests/dpo/test_ref_logprobs.py shows equal weights",
    "data.train": "an input",
    "data.val": "evaluation only",
    "data.test": "evaluation only",
    "data.eval_batch_size": "evaluation only",
    "data.splits": "of hub data sets: tests/data/test_files.py",
    "data.subset": "of hub data sets: tests/data/test_files.py",
    "data.columns*": "tests/data/test_records.py",
    "data.cache_dir": "does not change a result: tests/data/test_cache.py",
    "data.on_error": "needs an invalid record: tests/data/test_datamodule.py",
    "model.chunk_size": "speed: tests/models/test_backbone.py",
    "model.max_length": "a limit: tests/sampling/test_sampler.py",
    "model.path": "an input",
    "model.revision": "of hub models: tests/models/test_sources.py",
    "model.attention": "speed: tests/models/test_sources.py and tests/test_export.py",
    "adapter.*": "needs a trained base model: tests/models/test_adapters.py",
    "reward.batch_size": "speed",
    "reward.path": "an input: tests/reward_functions",
    "reward.marker": "tests/reward_functions",
    "reward.strict": "tests/reward_functions",
    "reward.correct": "tests/reward_functions",
    "reward.wrong": "tests/reward_functions",
    "reward.weights.*": "tests/reward_functions",
    "reward.components.*": "tests/reward_functions",
}
