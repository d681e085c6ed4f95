"""The generic tests catch what a new variant can get wrong: each mistake, planted, fails at least one of them."""

import contextlib

import pytest
import test_attention as generic
import torch.nn.functional as F

from attention import ATTENTION, apply_rope
from experiments.family import HeadGated


class CacheIgnored(HeadGated):
    def forward(self, x, rope, cache=None):
        return super().forward(x, rope)


class PositionsIgnored(HeadGated):
    def attend(self, x, q, k, v, positions):
        return super().attend(x, q, k, v, None)


class FutureSeen(HeadGated):
    def attend(self, x, q, k, v, positions):
        return super().attend(x, q, k, v + 0.1 * v.mean(2, keepdim=True), positions)


class DropoutInEval(HeadGated):
    def attend(self, x, q, k, v, positions):
        return F.dropout(super().attend(x, q, k, v, positions), self.config.dropout, training=True)


class KeysNotRotated(HeadGated):
    def forward(self, x, rope, cache=None):
        self.rope = rope
        return super().forward(x, rope, cache)

    def attend(self, x, q, k, v, positions):
        cos, sin = self.rope
        if len(cos) == k.size(2):
            k = apply_rope(k.transpose(1, 2), (cos, -sin)).transpose(1, 2)
        return super().attend(x, q, k, v, positions)


CHECKS = {
    "causality": lambda name: generic.test_a_future_token_changes_nothing(name, False),
    "cache": lambda name: generic.test_cached_equals_uncached(name, dict(n_kv_head=4), [9, 8], 3),
    "ragged": lambda name: generic.test_rows_of_different_lengths_share_a_cache(name, dict(n_kv_head=4)),
    "dropout": lambda name: generic.test_dropout_acts_in_training_only(name),
    "distances": lambda name: generic.test_only_distances_between_positions_matter(name),
}


def failed_checks(variant, monkeypatch):
    monkeypatch.setitem(ATTENTION, "planted", variant)
    failed = set()
    for name, check in CHECKS.items():
        try:
            with contextlib.suppress(RuntimeError):  # of sizes that no longer fit together
                check("planted")
                continue
        except AssertionError:
            pass
        failed.add(name)
    return failed


MISTAKES = {CacheIgnored: "cache", PositionsIgnored: "ragged", FutureSeen: "causality", DropoutInEval: "dropout"}
MISTAKES[KeysNotRotated] = "distances"


@pytest.mark.parametrize("mistake,check", MISTAKES.items())
def test_a_planted_mistake_is_caught(mistake, check, monkeypatch):
    assert failed_checks(HeadGated, monkeypatch) == set()
    assert check in failed_checks(mistake, monkeypatch)
