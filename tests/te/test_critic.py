"""PPO's actor and critic on Transformer Engine's layers: the test of Megatron's local ones, run on them."""

from tests.policy.test_critic import expected, folders, test_every_layout_is_plain_torch  # noqa: F401
