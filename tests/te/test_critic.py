"""PPO's actor and critic on Transformer Engine's layers: the tests of Megatron's local ones, run on them."""

from tests.policy.test_critic import (  # noqa: F401
    expected,
    folders,
    test_every_layout_is_plain_torch,
    test_weights_wait_on_the_host,
)
