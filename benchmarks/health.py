"""Whether a poisoned row is noticed, named and taken back, and whether healthy runs are left alone.

python -m benchmarks.health [--seeds 100] [--twins 6] [--clean 20] [--clean-steps 500]
    [--minutes 600]

A small Llama learns Python's own source. Twins are runs of so many seeds of model and order,
healthy to their end. Each poison is planted into one row of a step of sixteen, into four, or into
half of them, in a copy of a twin's data, which goes on from the twin's checkpoint with
``health.policy: rewind``; everything else is the same, so 50 steps later its loss is held against
the twin's, over ten steps. A few rows may change a step too little to be noticed: then nothing is
done, and the loss says whether that was right. Named first: by ``hfscale incident``, as the first
in its list by gradient or by loss. Clean runs are others again: whatever is noticed in them is a
false alarm.
"""

from __future__ import annotations

import argparse
import base64
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedTokenizerFast

from benchmarks.common import machine, record, table, verdict
from hfscale.checkpoint import layout
from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.log import logger
from hfscale.monitor.incidents import Incident, incidents
from hfscale.reports.incident import rerun
from hfscale.run_files import CHECKPOINTS, CONFIG, METRICS
from hfscale.tokenizer import load_tokenizer
from tests.helpers.corpus import LLAMA, make_corpus, run_values
from tests.helpers.poison import plant
from tests.helpers.ranks import close_ranks, run_ranks
from tests.helpers.training import train

SEQ_LEN, BATCH = 64, 16
DOSES = (1, 4, 8)  # rows of a step that are planted
HEALTHY = 120  # steps of a twin before poisons; those after its checkpoint of then have them
AFTER, MEASURED = 50, 10  # steps after a poison, and those at their end whose losses are compared
LATEST = 15  # steps after HEALTHY within which a poison lies
OTHER_LANGUAGE = (
    "Vaka vanha Väinämöinen itse tuon sanoiksi virkkoi: näistäpä toki tulisi kalanluinen "
    "kanteloinen, kun oisi osoajata, soiton luisen laatijata. Kun ei toista tullutkana, ei ollut "
    "osoajata, soiton luisen laatijata, itse loihe laatijaksi, tekijäksi teentelihe. "
)


def garbage(rng: random.Random) -> str:
    """Return bytes that are no text."""
    return rng.randbytes(4 * SEQ_LEN).decode("latin-1")


def repeated(rng: random.Random) -> str:
    """Return a few words again and again."""
    words = ["import", "return", "None", "self", "value", "raise", "for", "in"]
    return " ".join(rng.sample(words, 3)) + " "


def foreign(rng: random.Random) -> str:
    """Return text in a language that the data has not."""
    begin = rng.randrange(len(OTHER_LANGUAGE) // 2)
    return OTHER_LANGUAGE[begin:] + OTHER_LANGUAGE


def blob(rng: random.Random) -> str:
    """Return what looks like a picture in base64."""
    return base64.b64encode(rng.randbytes(4 * SEQ_LEN)).decode()


def one_token(rng: random.Random) -> str:
    """Return one character, to be repeated."""
    return rng.choice("=#(-x0")


def numbers(rng: random.Random) -> str:
    """Return numbers beyond 65,504, the largest of fp16."""
    return " ".join(str(rng.randrange(10**5, 10**12)) for _ in range(SEQ_LEN))


POISONS: dict[str, Callable[[random.Random], str]] = {
    "garbage bytes": garbage,
    "a repeated n-gram": repeated,
    "another language": foreign,
    "a base64 blob": blob,
    "one token repeated": one_token,
    "numbers beyond fp16": numbers,
}


@dataclass(frozen=True)
class Case:
    """What became of one step with planted rows."""

    kind: str
    dose: int
    noticed: bool
    blamed: bool  # of those rows some, and no others, were left out
    listed: bool  # hfscale incident names it first, by gradient or by loss
    off: float  # of the twin's loss, relatively, 50 steps later
    false_alarms: int  # incidents of other steps


def values(root: Path, name: str, *, seed: int, steps: int) -> dict[str, Any]:
    """Return the config of a run that reads ``root``'s shards."""
    return run_values(
        root,
        root,
        name,
        run={"seed": seed},
        model=LLAMA,
        data={"verify": False, "seq_len": SEQ_LEN},
        optim={"lr": 3e-3},
        schedule={"name": "constant", "warmup_steps": 10},
        train={"steps": steps, "global_batch": BATCH, "micro_batch": BATCH},
        checkpoint={"every_steps": 10, "keep_last": 100},
        health={"policy": "rewind"},
    )


def run(settings: dict[str, Any]) -> dict[int, float]:
    """Return the loss of each step of a run; of one done again, the last."""
    records = run_ranks(train, 1, settings, timeout_s=1200)[0]
    config = RunConfig.model_validate(settings)
    (config.run_dir / CONFIG).write_text(to_yaml(config))
    return {one["step"]: one["loss"] for one in records}


def copied(corpus: Path, root: Path) -> Path:
    """Return ``root`` with the corpus in it."""
    root.mkdir(parents=True)
    for part in ("tokenizer", "shards"):
        shutil.copytree(corpus / part, root / part)
    return root


class Twin:
    """A healthy run, and what its losses were."""

    def __init__(self, corpus: Path, folder: Path, seed: int) -> None:
        self.corpus, self.seed = corpus, seed
        self.root = copied(corpus, folder / f"twin-{seed}")
        settings = values(self.root, "twin", seed=seed, steps=HEALTHY + LATEST + AFTER)
        self.losses = run(settings)
        self.run_dir = RunConfig.model_validate(settings).run_dir
        self.alarms = len(incidents(self.run_dir))

    def poisoned(self, kind: str, dose: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> Case:
        """Return what becomes of this run with a poison of ``kind`` in ``dose`` rows of a step."""
        rng = random.Random(seed)
        step = HEALTHY + rng.randint(1, LATEST)
        planted = {(step - 1) * BATCH + row for row in rng.sample(range(BATCH), dose)}
        root = copied(self.corpus, self.root.parent / f"poison-{seed}")
        settings = values(root, "poisoned", seed=self.seed, steps=step + AFTER)
        config = RunConfig.model_validate(settings)
        name = layout.step_name(HEALTHY)
        shutil.copytree(self.run_dir / CHECKPOINTS / name, config.run_dir / CHECKPOINTS / name)
        shutil.copy(self.run_dir / METRICS, config.run_dir)
        for position in planted:
            plant(config, position, tokenizer.encode(POISONS[kind](rng))[: SEQ_LEN - 1])
        losses = run(settings)
        told = incidents(config.run_dir)
        last = range(step + AFTER - MEASURED + 1, step + AFTER + 1)
        clean, ours = (sum(series[n] for n in last) for series in (self.losses, losses))
        case = Case(
            kind=kind,
            dose=dose,
            noticed=any(one.step == step for one in told),
            blamed=any(one.step == step and _blames(one, planted) for one in told),
            listed=_listed(config.run_dir, step, planted),
            off=abs(ours / clean - 1),
            false_alarms=sum(one.step != step for one in told),
        )
        shutil.rmtree(root)
        return case


def _blames(incident: Incident, planted: set[int]) -> bool:
    left_out = {row for first, stop in incident.left_out for row in range(first, stop)}
    return bool(left_out) and left_out <= planted


def _listed(run_dir: Path, step: int, planted: set[int]) -> bool:
    """Return whether ``hfscale incident`` names one of the rows at ``planted`` first."""
    again = rerun(run_dir, step=step, rows_of=((step - 1) * BATCH, step * BATCH))
    first = {again.by_gradient()[0].part.position, again.by_loss()[0].part.position}
    return bool(first & planted)


def clean_alarms(
    corpus: Path, folder: Path, *, runs: int, steps: int, until: float
) -> tuple[int, Counter[str]]:
    """Return how many healthy runs there were ``until`` a time of the clock, and what was noticed
    in them, by kind; in a process of its own.
    """
    alarms, done = Counter[str](), 0
    for seed in range(1000, 1000 + runs):
        if time.time() > until:
            break
        root = copied(corpus, folder / f"clean-{seed}")
        settings = values(root, "clean", seed=seed, steps=steps)
        settings["checkpoint"] |= {"every_steps": 100, "keep_last": 2}
        run(settings)
        told = incidents(RunConfig.model_validate(settings).run_dir)
        alarms.update(one.kind for one in told)
        done += 1
        print(f"  clean run {seed - 999}/{runs}: {len(told)} alarms", file=sys.stderr, flush=True)
        shutil.rmtree(root)
    close_ranks()
    return done, alarms


def report(cases: list[Case], alarms: Counter[str], *, runs: int, steps: int) -> str:
    """Return the section of RESULTS.md."""
    rows = []
    for kind, dose in product(POISONS, DOSES):
        of_kind = [case for case in cases if (case.kind, case.dose) == (kind, dose)]
        off = [case.off for case in of_kind] or [0.0]
        rows.append(
            [
                kind,
                f"{dose} of {BATCH}",
                len(of_kind),
                sum(case.noticed for case in of_kind),
                sum(case.blamed for case in of_kind),
                sum(case.listed for case in of_kind),
                f"{median(off):.2%}, at most {max(off):.2%}",
            ]
        )
    heading = [
        "poison",
        "rows of the step",
        "planted",
        "noticed",
        "those rows alone left out",
        "first in hfscale incident",
        "loss off the clean twin's, 50 steps later",
    ]
    named = sum(case.listed for case in cases) / len(cases)
    near = sum(case.off <= 0.01 for case in cases) / len(cases)
    lines = [
        f"- named first: {named:.1%} of {len(cases)}: {verdict(named, at_least=0.95)}",
        f"- loss within 1 % of the clean twin's: {near:.1%}: {verdict(near, at_least=1.0)}",
        f"- false alarms beside the poisons: {sum(case.false_alarms for case in cases)}",
        f"- false alarms in {runs} clean runs of {steps} steps: {alarms.total()} "
        f"{dict(alarms) or ''}: {verdict(alarms.total(), at_most=0)}",
    ]
    return table(heading, rows) + "\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--twins", type=int, default=6)
    parser.add_argument("--clean", type=int, default=20)
    parser.add_argument("--clean-steps", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=600, help="then no other run begins")
    parser.add_argument("--dry", action="store_true", help="print, and leave RESULTS.md alone")
    options = parser.parse_args()
    about, start = machine("torch", "deepspeed", "transformers"), time.monotonic()
    logger.disabled = True
    cases = list[Case]()
    with tempfile.TemporaryDirectory(prefix="hfscale-health-") as name:
        folder = Path(name)
        corpus = make_corpus(folder / "corpus")
        beside = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        until = time.time() + 60 * options.minutes
        healthy = beside.submit(
            clean_alarms,
            corpus,
            folder,
            runs=options.clean,
            steps=options.clean_steps,
            until=until,
        )
        tokenizer = load_tokenizer(corpus / "tokenizer")
        kinds = [*product(POISONS, DOSES)]
        twins = [Twin(corpus, folder, seed) for seed in range(options.twins)]
        for seed in range(options.seeds):
            if time.time() > until:
                break
            kind, dose = kinds[seed % len(kinds)]
            case = twins[seed % len(twins)].poisoned(kind, dose, seed, tokenizer)
            cases.append(case)
            print(f"  {seed + 1}/{options.seeds} {case}", file=sys.stderr, flush=True)
        runs, alarms = healthy.result()
        beside.shutdown()
        alarms["of twins"] += sum(twin.alarms for twin in twins)
    close_ranks()
    body = report(cases, +alarms, runs=runs, steps=options.clean_steps)
    minutes = (time.monotonic() - start) / 60
    body = f"{about} {minutes:.0f} minutes.\n\n{body}"
    print(body) if options.dry else record("Health", body)


if __name__ == "__main__":
    main()
