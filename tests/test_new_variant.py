"""The generic tests catch what a new variant can get wrong: each mistake, planted, fails at least one of them."""

import contextlib

import pytest
import test_attention as generic
import torch.nn.functional as F
from test_train import run

import sample
from attention import ATTENTION, apply_rope
from experiments import sweep
from experiments.family import HeadGated
from model import GPTConfig, KVCache


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
    "cache": lambda name: generic.test_cached_equals_uncached(name, False, 4, [9, 8], 3),
    "ragged": lambda name: generic.test_rows_of_different_lengths_share_a_cache(name, False, 4),
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


def test_every_program_takes_it_by_name(tmp_path, data, capsys):
    shape = dict(vocab_size=257, n_layer=2, n_head=4, n_embd=32, block_size=64, attention="gated")
    config = GPTConfig(**shape)
    gates = 6 * 2 * 32 * 4  # forward and backward, two layers
    assert config.flops_per_token() == GPTConfig(**{**shape, "attention": "mha"}).flops_per_token() + gates
    assert KVCache(config, 1, 10).nbytes == 10 * config.kv_bytes_per_token()
    run("--attention gated --max_steps 3 --out_dir", tmp_path / "run", data=data)
    capsys.readouterr()
    sample.main(["--checkpoint", str(tmp_path / "run"), "--prompt", "key", "--max_new_tokens", "5", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("key")
    assert sweep.Setting("gated", 1e-3).options(0)[:2] == ["--attention", "gated"]


def test_compress_refuses_it_and_says_why(tmp_path, data, capsys):
    import compress

    run("--attention gated --max_steps 1 --out_dir", tmp_path / "run", data=data)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        compress.main(["--checkpoint", str(tmp_path / "run")])
    assert "does not know how it reads keys and values" in capsys.readouterr().err


def test_a_gate_that_is_half_open_halves_multi_head_attention():
    layer, mha, x = generic.make("gated"), generic.make("mha"), generic.inputs()
    layer.gate_proj.weight.data.zero_()  # sigmoid(0) is a half
    generic.copy_shared(layer, mha)
    generic.assert_same(2 * layer(x, generic.rope(0, generic.T)), mha(x, generic.rope(0, generic.T)))
