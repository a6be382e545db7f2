"""A contestant of the demo: the fused loss or the naive one, on the head alone and in whole training steps.

Runs in a process of its own (`demo_turns`) and works only when it is asked to. Requests and answers are
dictionaries; ``request["do"]`` is one of

    start   load the model and the tokenizer
    head    one forward and backward pass of head and loss, on hidden states of a real batch's shape
    begin   set up the training; with ``evaluate``, evaluate the held-out pairs first
    step    one optimizer step
    sample  the answer to a held-out prompt, without and with the trained adapter
    save    write the adapter

A ``head`` or ``step`` with ``memory`` is not timed but measured for the tensor memory that it adds.
"""

from __future__ import annotations

import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from demo_memory import TensorMemory, reset_resident_peak, resident_peak
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging

import slime_fused
from slime_fused.model.calls import naive_loss
from slime_fused.trainer import PreferenceCollator, SlimeConfig, SlimeTrainer, load_model, load_tokenizer
from slime_fused.trainer.data import PairTokenizer, prepare_dataset
from slime_fused.trainer.formats import parse_pair
from slime_fused.trainer.reading import read_pairs

REPORTED = ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")


def prepare(connection: Connection, source: str, folder: Path) -> None:
    """Turn a model file into a folder that the contestants load in a moment."""
    quiet()
    while connection.recv() is not None:
        model, tokenizer = load_model(source), load_tokenizer(source)
        part = folder.with_suffix(".part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)  # whole or not at all
        connection.send({})


def contest(
    connection: Connection, impl: str, model: str, pairs: Path, folder: Path, shape: dict[str, int]
) -> None:
    """Serve requests until there are no more. ``shape`` is that of the training run: see `Training`."""
    quiet()
    head, training = None, None
    while (request := connection.recv()) is not None:
        match request["do"]:
            case "start":
                loaded, tokenizer = load_resident(model), load_tokenizer(model)
                answer = {"parameters": loaded.num_parameters(), "vocabulary": loaded.config.vocab_size}
            case "head":
                head = head or Head(loaded, tokenizer, pairs, impl, request["pairs"], request["max_length"])
                answer = head.measure(request["memory"])
            case "begin":
                head, training = None, Training(loaded, tokenizer, pairs, folder / impl, impl, **shape)
                answer = {"evaluation": training.evaluate() if request["evaluate"] else None}
                answer["held_out"] = len(training.trainer.eval_dataset)
            case "step":
                training.run(connection, request)  # serves the steps that follow, up to the last
                continue
            case "sample":
                answer = training.sample(request["tokens"])
            case "save":
                training.trainer.save_model(request["folder"])
                answer = {}
        connection.send(answer)


def quiet() -> None:
    """Leave out what libraries print besides errors."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def load_resident(path: str) -> Any:
    """The model with its weights copied into memory: pages of a mapped file come and go and blur the numbers."""
    model = load_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


class Stopwatch:
    """Wall-clock and processor seconds of a block, and the tensor memory that it adds where that is asked for."""

    def __init__(self, memory: bool) -> None:
        # Recording every allocation takes time itself, so a block is either timed or measured for memory.
        self._memory = TensorMemory() if memory else None

    def start(self) -> None:
        reset_resident_peak()
        if self._memory is not None:
            self._memory.__enter__()
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        if self._memory is not None:
            self._memory.__exit__(None, None, None)
            return {"memory": self._memory.peak}
        wall, processor = self._began
        return {
            "seconds": time.perf_counter() - wall,
            "processor_seconds": time.process_time() - processor,
            "resident": resident_peak(),
        }


class Head:
    """Output head and loss alone, forward and backward, on hidden states and labels of a real batch's shape."""

    def __init__(self, model: Any, tokenizer: Any, pairs: Path, impl: str, num_pairs: int, max_length: int) -> None:
        args = SlimeConfig(output_dir="unused", max_length=max_length, use_cpu=True)
        self._config, self._impl = args.loss_config(), impl
        rows = read_pairs(pairs)
        rows = rows.select(range(min(8 * num_pairs, len(rows))))  # more than enough: long prompts are dropped
        tokens = prepare_dataset(rows, tokenizer, args, "demo")
        batch = PreferenceCollator(tokenizer.pad_token_id)(list(tokens.select(range(min(num_pairs, len(tokens))))))
        self._labels = batch["labels"]
        self._tokens = int(batch["attention_mask"].sum())
        # A head that is trained, as in full fine-tuning: the model's own, whatever the adapter does to it.
        self._weight = model.get_output_embeddings().weight.detach().clone().requires_grad_()
        torch.manual_seed(0)
        self._hidden = torch.randn(*self._labels.shape, self._weight.shape[1]).mul_(2.0).requires_grad_()

    def _step(self) -> float:
        self._hidden.grad = self._weight.grad = None
        if self._impl == "fused":
            output = slime_fused.slime_loss(
                self._hidden, self._weight, self._labels, config=self._config, shift=True
            )
            loss = output.loss
        else:
            logits = torch.nn.functional.linear(self._hidden, self._weight)
            loss = naive_loss(logits, self._labels, self._config)["loss"]
        loss.backward()
        return float(loss.detach())

    def measure(self, memory: bool) -> dict[str, float]:
        """One pass. Its gradients count as memory that it adds: they are what a caller asks for."""
        self._hidden.grad = self._weight.grad = None
        watch = Stopwatch(memory)
        watch.start()
        loss = self._step()
        targets = int((self._labels[:, 1:] != -100).sum())
        return watch.stop() | {
            "loss": loss,
            "tokens": self._tokens,
            "positions": self._labels.numel(),
            "targets": targets,
        }


class Training:
    """Whole optimizer steps on a LoRA adapter: model, head, loss, backward, AdamW.

    An adapter as most people train one, with the head frozen: the weights' own gradients and AdamW's copies of them
    would hide everything else on a model this small. ``held_out`` pairs are kept back from the rest, in the order
    of the file; every evaluation is on these same pairs.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pairs: Path,
        folder: Path,
        impl: str,
        *,
        num_pairs: int,
        max_length: int,
        steps: int,
        held_out: int,
    ) -> None:
        args = SlimeConfig(
            output_dir=str(folder),
            loss_impl=impl,
            per_device_train_batch_size=num_pairs,
            per_device_eval_batch_size=num_pairs,
            max_length=max_length,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        rows = read_pairs(pairs)
        # About half of the demo's prompts leave no room for a response; whatever is not needed is not tokenised.
        rows = rows.select(range(min(3 * (held_out + steps * num_pairs), len(rows))))
        rows = rows.map(PairTokenizer(tokenizer, "demo", args.max_length, args.truncation), with_indices=True)
        kept = rows.filter(lambda row: row["verdict"] in ("", "shifted"))
        if len(kept) <= held_out:
            raise ValueError(f"data: expected more than {held_out} usable pairs, got {len(kept)} in {pairs}")
        self._tokenizer = tokenizer
        self._watch = _Watch()
        self.trainer = SlimeTrainer(
            model,
            args,
            train_dataset=kept.select(range(held_out, len(kept))),
            eval_dataset=kept.select(range(held_out)),
            processing_class=tokenizer,
            callbacks=[self._watch],
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        )

    def evaluate(self) -> dict[str, float]:
        """The held-out pairs with the adapter as it is now."""
        return _evaluation(self.trainer.evaluate())

    def run(self, connection: Connection, first: dict[str, Any]) -> None:
        """Serve ``first``, a ``step`` request, and those that follow, up to one with ``last``."""
        self._watch.serve(connection, first)
        self.trainer.train()

    def sample(self, num_tokens: int) -> dict[str, str]:
        """What the model answers to the shortest held-out prompt before and after training, by greedy decoding."""
        row: Any = min(self.trainer.eval_dataset, key=lambda row: row["chosen_prompt_length"])
        ids = torch.tensor([row["chosen_ids"][: row["chosen_prompt_length"]]])
        model: Any = self.trainer.model
        model.eval()

        def answer() -> str:
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=num_tokens,
                    do_sample=False,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            return str(self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

        with model.disable_adapter():
            before = answer()
        pair = parse_pair(row, "held-out pair")
        return {"prompt": _text(pair.prompt), "before": before, "after": answer(), "chosen": _text(pair.chosen)}


class _Watch(TrainerCallback):
    """Holds every optimizer step until it is asked for, and answers with what it cost and what came of it."""

    def serve(self, connection: Connection, first: dict[str, Any]) -> None:
        self._connection, self._request = connection, first
        self._is_first = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_first:
            self._request = self._connection.recv()
        self._is_first = False
        self._watch = Stopwatch(self._request["memory"])
        self._watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._answer: dict[str, Any] = self._watch.stop()
        control.should_evaluate = self._request["evaluate"]
        control.should_training_stop |= self._request["last"]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._answer |= {"step": state.global_step, "loss": logs["loss"], "tokens": logs["num_new_tokens"]}
            if not self._request["evaluate"]:
                self._connection.send(self._answer)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            self._connection.send(self._answer | {"evaluation": _evaluation(metrics)})


def _evaluation(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"eval_{name}"] for name in REPORTED}


def _text(part: Any) -> str:
    """A prompt or response as text; of messages the last."""
    return part if isinstance(part, str) else str(part[-1]["content"])
