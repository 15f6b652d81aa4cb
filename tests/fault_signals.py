"""Faults of tests/faults.py: processes that are killed, or asked to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence

from fault_runs import (
    PRESETS,
    STEPS,
    STOPPED,
    Job,
    Lab,
    Moment,
    Start,
    Trial,
    children,
    choose_moment,
    compare,
    last_update,
    newest_good,
)

ROUNDING = 1e-5  # relative, between different numbers of processes
SELDOM = "--config.checkpoint.every=15"  # several processes take longer to save


def interruptions(
    lab: Lab, number: signal.Signals, kinds: Sequence[str], count: int
) -> Iterator[Trial]:
    """Signals at moments of these kinds in turn, `count` in all, ten to a run."""
    made = 0
    while made < count:
        job = Job(lab.workdir(number.name.lower()), PRESETS[made // 10 % 2])
        trials: list[Trial] = []
        ended = False
        while not ended:
            kind = kinds[(made + len(trials)) % len(kinds)]
            moment = choose_moment(lab.draw, kind)
            wanted = len(trials) < min(10, count - made)
            with Start(job) as start:
                if wanted and start.wait_for(moment):
                    start.process.send_signal(number)
                code = start.end()
            if trials and start.lost is not None and trials[-1].lost is None:
                worse = trials[-1].problems + start.mistakes()
                trials[-1] = trials[-1]._replace(lost=start.lost, problems=worse)
            ended = code == 0 or len(trials) > count
            if code:
                check = stopped if number == signal.SIGTERM else killed
                fault = f"{number.name}, {moment.kind}"
                trials.append(check(Trial(fault, []), start, code))
        different = compare(job.workdir, lab.undisturbed(job))
        for trial in trials:
            problems = trial.problems + different
            yield trial._replace(equal=not different, problems=problems)
        made += len(trials)


def killed(trial: Trial, start: Start, code: int) -> Trial:
    """Checks the end by SIGKILL."""
    if code == -signal.SIGKILL:
        return trial
    return trial._replace(problems=[f"exit code {code}, not -9: {start.told[-300:]}"])


def stopped(trial: Trial, start: Start, code: int) -> Trial:
    """Checks the end by SIGTERM: the last update is saved."""
    at = last_update(start.workdir)
    problems = []
    if code != STOPPED:
        problems.append(f"exit code {code}, not {STOPPED}: {start.told[-300:]}")
    if newest_good(start.workdir) != at:
        problems.append(f"{newest_good(start.workdir)} is saved, not {at}")
    line = f"stopped: SIGTERM or a preemption notice at step {at} of {STEPS}, which is"
    return trial._replace(problems=problems, reported=line in start.told)


def sigkill(lab: Lab) -> Iterator[Trial]:
    """A process that is killed, at any moment."""
    kinds = ("saving", "update", "start", "sealing", "saving")
    yield from interruptions(lab, signal.SIGKILL, kinds, lab.some(40, 5))


def sigterm(lab: Lab) -> Iterator[Trial]:
    """A process that is asked to stop while it trains."""
    yield from interruptions(lab, signal.SIGTERM, ("update", "saving"), lab.some(10, 2))


def processes(lab: Lab) -> Iterator[Trial]:
    """One of two processes that is killed; launch/local.py starts both again."""
    for number in range(lab.some(4, 2)):
        victim = number % 2
        job = Job(
            lab.workdir("two"),
            PRESETS[number // 2],
            ("--heartbeat_seconds=5", SELDOM),
            processes=2,
            launcher=("--retries=1", "--backoff=2", "--grace=60"),
        )
        moment = choose_moment(lab.draw, ("saving", "update")[number // 2])
        with Start(job) as start:
            if not start.wait_for(moment):
                raise RuntimeError(f"exit code {start.end()}: {start.told}")
            found = children(start.process.pid)
            (process,) = [p for p, index in found.items() if index == victim]
            os.kill(process, signal.SIGKILL)
            start.wait_for_line("starts again in")
            good, reached = newest_good(job.workdir), last_update(job.workdir)
            code = start.end()
        problems = [] if code == 0 else [f"exit code {code}: {start.told[-300:]}"]
        if start.began_at != good:
            problems.append(f"continued at {start.began_at}, but {good} is good")
        named = f"process {victim} of 2 died or cannot be reached" in start.told
        different = [] if code else compare(job.workdir, lab.undisturbed(job), ROUNDING)
        yield Trial(
            f"process {victim} of 2 killed",
            problems + different,
            named,
            reached - (start.began_at or 0),
            not (code or different),
        )


def elastic(lab: Lab) -> Iterator[Trial]:
    """Other numbers of processes: at once, and from one start to the next."""
    for preset in ("transformer_pp", "anchored")[: lab.some(2, 1)]:
        alone = lab.undisturbed(Job(lab.folder, preset))
        job = Job(lab.workdir("elastic"), preset, (SELDOM,), processes=2, devices=2)
        with Start(job) as start:
            code = start.end()
        problems = [f"exit code {code}"] if code else []
        problems += compare(job.workdir, alone, ROUNDING)
        yield Trial("2 processes x 2 devices", problems, equal=not problems)

        path, problems, lost = lab.workdir("elastic"), [], []
        for count, devices in ((2, 2), (1, 1), (4, 1)):
            job = Job(path, preset, (SELDOM,), processes=count, devices=devices)
            moment = Moment("update", lab.draw.randint(20, 60), 0.0)
            with Start(job) as start:
                if count < 4 and start.wait_for(moment):
                    start.process.send_signal(signal.SIGTERM)
                code = start.end()
            problems += start.mistakes()
            if code != (0 if count == 4 else STOPPED):
                problems.append(f"exit code {code} of {count} processes")
            lost.append(start.lost or 0)
        problems += compare(path, alone, ROUNDING)
        fault = "2 processes, stopped, then 1, stopped, then 4"
        yield Trial(fault, problems, None, max(lost), not problems)
