"""What would train another loss than was asked for is refused, before a step of it, by name and with a way out."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
import trl
from transformers import LlamaForCausalLM
from trl import DPOTrainer

import slime_fused as sf
from slime_fused.integrations.trl import enable_loss, enable_slime
from slime_fused.model.check import HeadMismatchError
from tests.integrations.trl_cases import Expected, make_trainer
from tests.tiny_models import tiny_llama


@pytest.fixture
def trainer(tokenizer, tmp_path):
    return make_trainer(tokenizer, tmp_path)


@pytest.mark.parametrize("what", [object(), DPOTrainer, None])
def test_what_is_no_trainer(what):
    with pytest.raises(
        TypeError, match=r"trainer: expected a trl.DPOTrainer that is constructed, got .*takes the same"
    ):
        enable_slime(what)


def test_another_trainer_of_transformers(tokenizer, tmp_path):
    import transformers

    other = transformers.Trainer(tiny_llama(len(tokenizer)), transformers.TrainingArguments(str(tmp_path)))
    with pytest.raises(TypeError, match=r"got transformers\.trainer\.Trainer"):
        enable_slime(other)


def test_an_older_trl(trainer, monkeypatch):
    """0.28 and older have no such hook: what is put there is ignored, and plain DPO trains."""
    monkeypatch.delattr(DPOTrainer, "_compute_loss")
    monkeypatch.setattr(trl, "__version__", "0.28.0")
    with pytest.raises(ValueError, match=r"TRL 0\.28\.0 has no such method.*pip install 'trl>=0\.29'"):
        enable_slime(trainer)


def test_a_hook_with_other_arguments(trainer, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_compute_loss", lambda self, batch: None)
    with pytest.raises(ValueError, match=r"got _compute_loss\(self, batch\) in TRL .*install a release"):
        enable_slime(trainer)


def test_a_trainer_that_no_longer_calls_the_hook(trainer, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "compute_loss", lambda self, model, inputs, **options: 0.0)
    with pytest.raises(ValueError, match=r"trainer: expected DPOTrainer.compute_loss to call _compute_loss"):
        enable_slime(trainer)


def test_a_subclass_with_a_loss_of_its_own(tokenizer, tmp_path):
    class Mine(DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            return super()._compute_loss(model, inputs, return_outputs)

    with pytest.raises(ValueError, match=r"expected the _compute_loss of trl.DPOTrainer, got Mine's own"):
        enable_slime(make_trainer(tokenizer, tmp_path, cls=Mine))


def test_a_hook_that_somebody_else_has_put_there(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy")
    trainer._compute_loss = MethodType(lambda self, model, inputs, return_outputs: None, trainer)
    with pytest.raises(ValueError, match=r"got <bound method .* on this trainer; take off what put it there"):
        enable_slime(trainer)
    assert trainer.ref_model is not None  # what is refused is left as it was


def test_training_that_goes_past_the_hook_stops_before_the_first_step(trainer):
    """The guard of the run, whatever the checks have missed."""
    enable_slime(trainer)
    before = trainer.model.lm_head.weight.clone()

    def plain(model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss

    trainer.compute_loss = plain
    with pytest.raises(RuntimeError, match=r"expected it to call _compute_loss .* its own loss ran instead"):
        trainer.train()
    assert torch.equal(trainer.model.lm_head.weight, before)
    with pytest.raises(RuntimeError, match=r"expected it to call _compute_loss"):
        trainer.evaluate()


def test_a_trainer_that_has_begun(trainer):
    enable_slime(trainer)
    trainer.train()
    with pytest.raises(ValueError, match=r"expected one that has not begun to train, got one at step 3"):
        enable_slime(trainer)


def test_of_two_calls_the_last_one_counts(trainer):
    enable_slime(trainer)
    enable_loss(trainer, sf.losses.SimPO())
    expected = Expected(trainer, sf.losses.SimPO())
    trainer.train()
    expected.check()
    assert not any(name.startswith("slime/") for row in trainer.state.log_history for name in row)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["ipo"]}, r"args.loss_type: expected its default \['sigmoid'\].* got \['ipo'\]"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
            r"args.loss_type: .* got \['sigmoid', 'sft'\]",
        ),
        ({"label_smoothing": 0.1}, r"args.label_smoothing: expected its default 0.0.* got 0.1"),
        ({"use_weighting": True}, r"args.use_weighting: .* got True"),
        ({"f_divergence_type": "js_divergence"}, r"args.f_divergence_type: .* got 'js_divergence'"),
        ({"ld_alpha": 0.5}, r"args.ld_alpha: .* got 0.5"),
        ({"accelerator_config": {"dispatch_batches": True}}, r"expected dispatch_batches=False, got True"),
    ],
)
def test_options_of_the_loss_that_is_replaced(options, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        enable_slime(make_trainer(tokenizer, tmp_path, ref_model="copy", **options))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("_is_vision_dataset", True, r"train_dataset: expected text alone, got a dataset with images"),
        ("padding_free", True, r"args.padding_free: expected False, got True"),
        ("is_in_train", True, r"expected one that has not begun to train"),
    ],
)
def test_states_of_a_trainer(attribute, value, message, trainer):
    setattr(trainer, attribute, value)
    with pytest.raises(ValueError, match=message):
        enable_slime(trainer)


def test_several_gpus_in_one_process(trainer):
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"trainer: 2 GPUs in one process .*accelerate launch"):
        enable_slime(trainer)


def test_a_synchronised_reference(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy", sync_ref_model=True)
    with pytest.raises(ValueError, match=r"args.sync_ref_model: expected False, since Slime has no reference"):
        enable_slime(trainer)
    with pytest.raises(ValueError, match=r"cache_reference: expected False with sync_ref_model"):
        enable_loss(trainer, sf.losses.DPO(), cache_reference=True)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (sf.losses.PolicyGradient(), ValueError, r"loss: expected a loss of preferences, got PolicyGradient"),
        (sf.losses.SFT(), ValueError, r"loss: expected a loss of preferences, got SFT.*SFTTrainer"),
        (sf.losses.KTO(), ValueError, r"expected KTO with baseline='batch' or 'zero', got 'given'"),
        (
            sf.losses.Own(lambda pairs: pairs.chosen_mean_logps, needs=("weights",)),
            ValueError,
            r"which needs \['weights'\]",
        ),
        ("dpo", TypeError, r"loss: expected a loss of slime_fused.losses or a function of pairs, got 'dpo'"),
    ],
)
def test_losses_that_pairs_cannot_train(loss, error, message, trainer):
    with pytest.raises(error, match=message):
        enable_loss(trainer, loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tpu"}, r"backend: expected 'auto' or one of .* got 'tpu'"),
        ({"workspace": "a lot"}, r"workspace: expected 'auto', bytes, or a string"),
        ({"workspace": 0}, r"workspace: expected a positive number of bytes, got 0"),
        ({"config": "paper"}, r"config: expected a SlimeLossConfig or None, got str"),
    ],
)
def test_options(options, message, trainer):
    with pytest.raises((ValueError, TypeError), match=message):
        enable_slime(trainer, **options)
    with pytest.raises(ValueError, match=r"cache_reference: Slime needs no reference; expected False"):
        enable_loss(trainer, sf.SlimeLossConfig(), cache_reference=True)


def test_a_reference_that_is_needed_and_missing(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"ref_model: DPO expected a reference model.*the trainer has none"):
        enable_loss(trainer, sf.losses.DPO())
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy")
    enable_slime(trainer)
    with pytest.raises(ValueError, match=r"an earlier enable_slime or enable_loss dropped it"):
        enable_loss(trainer, sf.losses.DPO())


def test_a_placeholder_that_is_trained_against(trainer):
    with pytest.raises(RuntimeError, match=r"ref_model: no_reference\(\) was passed .* call enable_slime"):
        trainer.train()


def test_sums_where_token_log_probs_are_needed(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy", precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match=r"args.precompute_ref_log_probs: expected False, since DPO needs"):
        enable_loss(trainer, sf.losses.DPO(ld_alpha=0.5))


class Collator:
    """Another layout than TRL's."""

    def __init__(self, change) -> None:
        self.change = change

    def __call__(self, examples):
        size = len(examples)
        ids = torch.ones((2 * size, 4), dtype=torch.long)
        return self.change({"input_ids": ids, "attention_mask": ids, "completion_mask": ids})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"chosen_input_ids": b["input_ids"]}, r"data_collator: .*got \['chosen_input_ids'\]"),
        (lambda b: b | {"labels": b["input_ids"]}, r"data_collator: .*got .*'labels'"),
        (lambda b: {k: v[:1] for k, v in b.items()}, r"as many chosen rows as rejected ones, got 1 rows"),
        (lambda b: b | {"pixel_values": b["input_ids"]}, r"expected text alone, got a batch with images"),
    ],
)
def test_collators_of_another_layout(change, message, tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, extra={"data_collator": Collator(change)})
    with pytest.raises(ValueError, match=message):
        enable_slime(trainer)


def test_rows_that_take_turns(tokenizer, tmp_path):
    """Chosen, rejected, chosen, rejected: nothing but the prompts tells."""
    trainer = make_trainer(tokenizer, tmp_path)
    collate = trainer.data_collator

    def interleaved(examples):
        return {
            key: value.view(2, len(examples), -1).transpose(0, 1).flatten(0, 1)
            for key, value in collate(examples).items()
        }

    trainer.data_collator = interleaved
    with pytest.raises(ValueError, match=r"got rows 0 and 2 of 4 with different prompts"):
        enable_slime(trainer)


def test_logits_that_are_more_than_the_head_gives(tokenizer, tmp_path):
    class Sharpened(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 1.5
            return outputs

    model = Sharpened(tiny_llama(len(tokenizer)).config)
    trainer = make_trainer(tokenizer, tmp_path, model)
    enable_slime(trainer)
    with pytest.raises(HeadMismatchError, match=r"log-probs .* of Sharpened differ .*under TRL"):
        trainer.train()
    trainer = make_trainer(tokenizer, tmp_path, model)
    enable_slime(trainer, check_head=False)
    trainer.train()
