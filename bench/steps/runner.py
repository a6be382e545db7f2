"""Check, then measure, a set of contestants on one training step in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from bench.contestants import Step
from bench.measure import clock_for, peak_memory
from bench.results import FAILED, NOT_FINISHED, OK, UNSUPPORTED
from bench.runner import failure_reason
from bench.steps.cases import StepBatch, StepCase, make_batch
from bench.steps.check import TOLERANCE, Fingerprint, StepErrors, compare, expected_fingerprint, fingerprint
from bench.steps.contestants import StepContestant
from bench.steps.memory import Found, is_out_of_memory, largest_fitting, limited_data, release_memory
from bench.steps.model import Training, build_training, held_bytes, training_step
from bench.steps.results import OUT_OF_MEMORY, WRONG, LimitRow, Quantity, StepRow
from bench.worker import OUT_OF_TIME

Report = Callable[[StepRow], None]
AnyRow = TypeVar("AnyRow", StepRow, LimitRow)


@dataclass(frozen=True)
class StepProtocol:
    """How much is measured, and in which order: check, memory, time.

    Contestants take turns, ``rounds`` times. A turn is ``warm`` untimed steps and ``repeats`` timed ones, of which
    the median counts.
    """

    rounds: int = 4
    repeats: int = 1
    warm: int = 0
    check: bool = True
    memory: bool = False
    time: bool = True


# On the CPU the high-water mark is the process's, so memory has a process per contestant.
CPU_STEPS = StepProtocol()
CPU_MEMORY = StepProtocol(check=False, memory=True, time=False)
GPU_STEPS = StepProtocol(rounds=3, repeats=2, warm=1, memory=True)

# Of the time until a deadline: code of late contestants is still compiled when the first ones could be timed.
_SHARE_OF_ROUNDS = 0.4


@dataclass(frozen=True)
class Bounds:
    """Where the search for the largest size begins, and where it ends if everything fits."""

    unit: int
    bound: int


def run_step_case(
    case: StepCase,
    contestants: Sequence[StepContestant],
    device: torch.device,
    protocol: StepProtocol,
    deadline: float = float("inf"),
    report: Report = lambda row: None,
) -> list[StepRow]:
    """Rows of all contestants, in their order; each is reported whenever it has learnt something.

    ``deadline``: seconds since the epoch after which no round is begun; the last part of the time until then is
    kept for rounds, and contestants that were not checked before it are left out. Raises DeviceLost after a CUDA
    fault; rows reported until then are valid.
    """
    begun = time.time()
    last_check = begun + (deadline - begun) * (1.0 - (_SHARE_OF_ROUNDS if protocol.time else 0.0))
    rows: dict[str, StepRow] = {}
    training, batch = build_training(case, device), make_batch(case, device)
    expected = expected_fingerprint(training, batch) if protocol.check else None
    for contestant in contestants:
        release_memory(device)
        row = StepRow(case.name, contestant.name, note=contestant.note)
        reason = contestant.unsupported()
        if reason is not None:
            row = replace(row, status=UNSUPPORTED, reason=reason)
        elif time.time() >= last_check:
            row = replace(row, status=NOT_FINISHED, reason=OUT_OF_TIME)
        else:
            try:
                row = _examine(row, contestant, case, training, batch, protocol, expected)
            except Exception as error:
                row = failure(row, error)
            training.clear_gradients()
        rows[contestant.name] = row
        report(row)
    if protocol.time:
        ready = [contestant for contestant in contestants if rows[contestant.name].status == OK]
        _take_turns(rows, ready, training, batch, protocol, deadline, report)
    return [rows[contestant.name] for contestant in contestants]


def _examine(
    row: StepRow,
    contestant: StepContestant,
    case: StepCase,
    training: Training,
    batch: StepBatch,
    protocol: StepProtocol,
    expected: Fingerprint | None,
) -> StepRow:
    """The row with what the check and the memory say."""
    device = batch.input_ids.device
    if protocol.memory and device.type == "cpu":
        # Code, libraries and threads come into memory with a small step, not with the one that is measured.
        small = make_batch(case.but(pairs=1, length=16), device)
        training_step(training, contestant.prepare(training, small).loss)()
    prepared = contestant.prepare(training, batch)
    row = replace(row, ran=prepared.ran)
    if expected is not None:
        row = _checked(row, fingerprint(training, prepared.loss), expected, case.dtype)
        if row.status == WRONG:
            return row
    if protocol.memory:
        step = training_step(training, prepared.loss)
        if contestant.compiles or device.type == "cuda":
            step()
        held = held_bytes(training, *prepared.copies)
        row = replace(row, held_bytes=held, added_bytes=peak_memory(step, device))
    return row


def _checked(row: StepRow, actual: Fingerprint, expected: Fingerprint, dtype: str) -> StepRow:
    found = compare(actual, expected)
    row = replace(
        row,
        loss=actual.loss,
        gradient_norm=actual.norm,
        error_loss=found.loss,
        error_norm=found.norm,
        error_gradient=found.gradient,
    )
    if found.within(dtype):
        return row
    return replace(row, status=WRONG, reason=_difference(found, dtype))


def _difference(found: StepErrors, dtype: str) -> str:
    return (
        f"another step than float64's: relative errors of the loss {found.loss:.1e}, of the gradients' norm "
        f"{found.norm:.1e}, of the gradients {found.gradient:.1e}, where {TOLERANCE[dtype]:.0e} is allowed"
    )


def _take_turns(
    rows: dict[str, StepRow],
    contestants: Sequence[StepContestant],
    training: Training,
    batch: StepBatch,
    protocol: StepProtocol,
    deadline: float,
    report: Report,
) -> None:
    """Time the contestants round by round. One that raises leaves; the rows of the others go on."""
    device = batch.input_ids.device
    clock = clock_for(device)
    steps: dict[str, Step] = {}
    for contestant in contestants:
        steps[contestant.name] = training_step(training, contestant.prepare(training, batch).loss)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(protocol.rounds):
        if done and time.time() >= deadline:
            return
        for name, step in list(steps.items()):
            try:
                for _ in range(protocol.warm):
                    step()
                samples[name].append(statistics.median(clock.milliseconds(step) for _ in range(protocol.repeats)))
                rows[name] = rows[name].timed(samples[name], batch.decoder_positions)
            except Exception as error:
                rows[name] = failure(rows[name], error)
                del steps[name]
                training.clear_gradients()
            report(rows[name])
        release_memory(device)


def failure(row: AnyRow, error: Exception) -> AnyRow:
    """The row with the error as its reason; raises DeviceLost where nothing more can run in this process."""
    if is_out_of_memory(error):
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return replace(row, status=OUT_OF_MEMORY, reason=text[:200])
    return replace(row, status=FAILED, reason=failure_reason(row.contestant, error))


def find_limit(
    case: StepCase,
    contestant: StepContestant,
    quantity: Quantity,
    device: torch.device,
    bounds: Bounds,
    room: int | None = None,
    deadline: float = float("inf"),
) -> LimitRow:
    """The largest ``quantity`` of ``case`` at which a whole step does not run out of memory.

    ``room``: bytes that a step may allocate above weights and optimiser state (CPU only); None: the whole device.
    """
    row = LimitRow(case.name, contestant.name, quantity, room_bytes=room)
    reason = contestant.unsupported()
    if reason is not None:
        return replace(row, status=UNSUPPORTED, reason=reason)
    if time.time() >= deadline:
        return replace(row, status=NOT_FINISHED, reason=OUT_OF_TIME)
    try:
        found = _search(case, contestant, quantity, device, bounds, room, deadline)
    except Exception as error:
        return failure(row, error)
    row = replace(row, fits=found.fits, fails=found.fails, probes=found.probes)
    if found.fails is None and found.fits < bounds.bound:
        return replace(row, status=NOT_FINISHED, reason=f"{OUT_OF_TIME}; a larger size was not tried")
    return row


def _search(
    case: StepCase,
    contestant: StepContestant,
    quantity: Quantity,
    device: torch.device,
    bounds: Bounds,
    room: int | None,
    deadline: float,
) -> Found:
    training = build_training(case, device)

    def run(sized: StepCase) -> None:
        batch = make_batch(sized, device)
        training_step(training, contestant.prepare(training, batch).loss)()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def fits(size: int) -> bool:
        release_memory(device)
        try:
            run(case.but(**{quantity: size}))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            training.clear_gradients()
        return True

    # What the first step loads and allocates for good is no part of the room.
    run(case.but(pairs=1, length=16))
    with limited_data(room):
        return largest_fitting(fits, bounds.unit, bounds.bound, out_of_time=lambda: time.time() >= deadline)
