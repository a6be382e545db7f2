"""From which checkpoint a run goes on, and what is refused before a step is made."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path

import pytest
from datasets import IterableDataset
from peft import LoraConfig

from slime_fused.losses import DPO
from slime_fused.trainer import PreferenceConfig, PreferenceTrainer, SftConfig, SftTrainer, SlimeTrainer, evaluation
from slime_fused.trainer.checkpoints import RunRefusedError, check_same_run, fault_of, find_checkpoint
from slime_fused.trainer.run import _summarise
from tests.tiny_models import make_pairs, tiny_llama

SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "save_steps": 1,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
}


def preference(tokenizer, folder, *, beta=0.1, adapter=None, **settings):
    config = PreferenceConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    model = tiny_llama(len(tokenizer))
    given = {"train_dataset": make_pairs(8), "processing_class": tokenizer, "peft_config": adapter}
    return PreferenceTrainer(model, config, DPO(beta=beta), **given)


def sft(tokenizer, folder, rows=None, **options):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in make_pairs(8)] if rows is None else rows
    config = SftConfig(output_dir=str(folder), **SETTINGS)
    given = {"train_dataset": rows, "processing_class": tokenizer, **options}
    return SftTrainer(tiny_llama(len(tokenizer)), config, **given)


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """The output folder of a run of three steps, which is only read."""
    folder = tmp_path_factory.mktemp("whole")
    preference(tokenizer, folder).train()
    return folder


@pytest.fixture
def left(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "left"))


@contextlib.contextmanager
def warnings_of(name):
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger(name).removeHandler(handler)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tokenizer, left):
    (left / "checkpoint-3" / "trainer_state.json").unlink()  # as where a run was killed while it wrote
    trainer = preference(tokenizer, left)
    with warnings_of("slime_fused.trainer.checkpoints") as warned:
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    assert warned == [
        "resume_from_checkpoint: passed over checkpoint-3, a folder without trainer_state.json, which is written "
        "last; the run goes on from checkpoint-2"
    ]
    with pytest.raises(RunRefusedError, match=r"expected a checkpoint, got no/where: no such folder"):
        trainer.train(resume_from_checkpoint="no/where")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "trainer_state.json"), "its trainer_state.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "without the weights of a model or an adapter"),
        (lambda folder: cut(folder / "model.safetensors"), "its model.safetensors cannot be read"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "without optimizer.pt .*save_only_model=True"),
        (lambda folder: cut(folder / "optimizer.pt"), "its optimizer.pt cannot be read"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "without scheduler.pt"),
        (lambda folder: cut(folder / "rng_state.pth"), "its rng_state.pth cannot be read"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(left, damage, message):
    folder = left / "checkpoint-3"
    damage(folder)
    with pytest.raises(RunRefusedError, match=f"got .*checkpoint-3: .*{message}"):
        find_checkpoint(folder, left, save_only_model=False)
    assert find_checkpoint(True, left, save_only_model=False) == str(left / "checkpoint-2")


def test_what_a_checkpoint_may_lack(left):
    """Random states, the optimizer of a run that saves none, and anything of shards."""
    folder = left / "checkpoint-3"
    (folder / "rng_state.pth").unlink()
    assert fault_of(folder, save_only_model=False) is None
    (folder / "optimizer.pt").unlink()
    (folder / "scheduler.pt").unlink()
    assert fault_of(folder, save_only_model=True) is None
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model_fsdp_0", "global_step3"):
        (folder / name).mkdir()
        assert fault_of(folder, save_only_model=False) is None
        (folder / name).rmdir()
    for other in left.glob("checkpoint-*"):
        (other / "trainer_state.json").unlink()
    with pytest.raises(RunRefusedError, match=r"left holds no whole checkpoint: checkpoint-3, .*; checkpoint-1, "):
        find_checkpoint("true", left, save_only_model=False)


def test_the_checkpoint_of_another_kind_of_run_is_refused(tokenizer, whole, tmp_path):
    last = str(whole / "checkpoint-3")
    with pytest.raises(RunRefusedError, match="with stage preference, and this one has stage sft"):
        sft(tokenizer, tmp_path).train(resume_from_checkpoint=last)
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(RunRefusedError, match="with adapter=False, and this one has adapter=True"):
        preference(tokenizer, tmp_path, adapter=adapter).train(resume_from_checkpoint=last)
    with warnings_of("slime_fused.trainer.checkpoints") as warned:
        check_same_run(last, preference(tokenizer, tmp_path)._run_kind())
        check_same_run(last, preference(tokenizer, tmp_path, beta=0.3)._run_kind())
    (warning,) = warned
    assert "another loss: beta 0.1 there, 0.3 here;" in warning


def test_a_summary_of_a_run_whose_names_have_changed(tokenizer, tmp_path, capsys):
    trainer = sft(tokenizer, tmp_path)
    trainer.state.log_history = [{"loss": 0.5, "logps/chosen": -2.0}, {"loss": 0.25, "entropy": 4.0}]
    _summarise(trainer, None)
    lines = capsys.readouterr().out
    for number in ("0.5000", "0.2500", "-2.0000", "4.0000"):
        assert number in lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs: expected a number > 0 .* got 0"),
        ({"max_steps": 0}, "max_steps: expected at least 1, or -1 for num_train_epochs, got 0"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 9},
            "dataloader_drop_last: expected at least the 9 rows .* got a train_dataset of 8",
        ),
    ],
)
def test_a_training_of_no_step_is_refused(tokenizer, tmp_path, settings, message):
    with pytest.raises(RunRefusedError, match=message):
        preference(tokenizer, tmp_path, **settings).train()


def test_a_model_without_parameters_to_train_is_refused(tokenizer, tmp_path):
    trainer = preference(tokenizer, tmp_path)
    trainer.model.requires_grad_(False)
    with pytest.raises(RunRefusedError, match="model: expected parameters to train, got none"):
        trainer.train()


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("kind", ["preference", "sft"])
def test_a_stream_is_evaluated_and_predicted_as_its_rows_are(tokenizer, make_args, tmp_path, kind):
    rows = make_pairs(5, seed=1)
    if kind == "sft":
        rows = [{"text": row["prompt"] + row["chosen"]} for row in rows]
        build = lambda data: sft(tokenizer, tmp_path, rows, eval_dataset=data)  # noqa: E731
    else:
        build = lambda data: SlimeTrainer(  # noqa: E731
            tiny_llama(len(tokenizer)),
            make_args(),
            train_dataset=rows,
            eval_dataset=data,
            processing_class=tokenizer,
        )
    expected = build(rows).evaluate()["eval_loss"]
    trainer = build(stream(rows))
    for _ in range(2):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate({"a": stream(rows)})["eval_a_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(stream(rows)).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_tokens_that_the_model_cannot_embed_are_refused(tokenizer, tmp_path):
    size = len(tokenizer)
    good = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [size - 1]}
    bad = {**good, "rejected_ids": [4, size]}
    message = rf"row 1 of the train dataset: expected token ids below {size}, .* got {size}; processing_class has"
    config = PreferenceConfig(output_dir=str(tmp_path), **SETTINGS)

    def build(rows, model=None):
        model = tiny_llama(size) if model is None else model
        return PreferenceTrainer(model, config, DPO(), train_dataset=rows, processing_class=tokenizer)

    with pytest.raises(ValueError, match=message):
        build([good, bad])
    prepared = build([good, good]).train_dataset
    with pytest.raises(ValueError, match=message):
        build(prepared.map(lambda row, i: {"rejected_ids": [1, 2, size + i - 1]}, with_indices=True))
    with pytest.raises(ValueError, match=r"processing_class, its padding: expected token ids below 1, .* got 1;"):
        build([good], tiny_llama(1))
    with pytest.raises(ValueError, match=rf"row 0 of the train dataset: expected token ids below 9, .* has {size}"):
        SftTrainer(
            tiny_llama(9),
            SftConfig(output_dir=str(tmp_path), **SETTINGS),
            train_dataset=[{"text": "the cat sat"}],
            processing_class=tokenizer,
        )


def test_the_others_are_met_where_the_main_process_refuses_its_data(tokenizer, tmp_path, monkeypatch):
    """Else they would wait at a barrier, and end in its traceback instead of the refusal."""
    met = []

    class OneOfTwo:
        @contextlib.contextmanager
        def main_process_first(self):
            yield
            met.append("barrier")

    monkeypatch.setattr(evaluation, "PartialState", OneOfTwo)
    with pytest.raises(ValueError, match="row 0 of the train dataset"):
        sft(tokenizer, tmp_path, [{"x": 1}])
    assert met == ["barrier"]
