"""A hundred random kills, each resumed: `hfscale prove resume` at ZeRO 0 to 3, in fp32 and bf16, on
1, 2 and 4 ranks.

    python -m benchmarks.prove_resume                    # about 20 minutes on 4 idle cores
    python -m benchmarks.prove_resume --kills 24 --minutes 5

Each of the 24 combinations has one twin that nobody disturbs and one run that is killed several
times over: a GPT-2 of two layers with dropout on real text, 40 steps, a checkpoint every 3.
Certificates are kept in --home, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import machine, record, table, verdict
from tests.helpers.corpus import make_corpus, run_values

COMBINATIONS = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (1, 2, 4)))


def prove(home: Path, stage: int, precision: str, procs: int, *, kills: int) -> dict[str, Any]:
    """Return the certificate of one combination, made now or by an earlier session."""
    name = f"zero{stage}-{precision}-{procs}"
    certificate = home / f"{name}-{kills}.json"
    if not certificate.exists():
        values = run_values(
            home / "corpus",
            home / "runs",
            name,
            engine={"zero_stage": stage, "precision": precision},
            train={"steps": 40, "global_batch": 32, "micro_batch": 2},
            checkpoint={"every_minutes": None, "every_steps": 3},
        )
        (home / f"{name}.yaml").write_text(yaml.safe_dump(values))
        command = [
            sys.executable,
            "-m",
            "launch.cli",
            "prove",
            "resume",
            home / f"{name}.yaml",
            "train.steps=40",
            "checkpoint.every_steps=3",
            "--procs",
            procs,
            "--kills",
            kills,
            "--out",
            certificate,
            "--seed",
            COMBINATIONS.index((stage, precision, procs)),
        ]
        with open(home / f"{name}.log", "a") as log:
            subprocess.run(list(map(str, command)), stdout=log, stderr=log)
    if not certificate.exists():
        sys.exit(f"nothing was proven; see {home / f'{name}.log'}")
    return json.loads(certificate.read_text())


def main() -> None:
    """Prove, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--minutes",
        type=float,
        default=25.0,
        help="no combination begins after that; the same command goes on",
    )
    parser.add_argument(
        "--home", type=Path, default=Path(tempfile.gettempdir()) / "hfscale-prove-resume"
    )
    options = parser.parse_args()
    if not (options.home / "corpus" / "shards").exists():
        make_corpus(options.home / "corpus")
    began, proofs = time.monotonic(), {}
    each, more = divmod(options.kills, len(COMBINATIONS))
    for number, combination in enumerate(COMBINATIONS):
        kills = each + (number < more)
        if not kills or time.monotonic() - began > options.minutes * 60:
            continue
        proofs[combination] = prove(options.home, *combination, kills=kills)
        print(
            f"{len(proofs)} of {len(COMBINATIONS)}: {combination} {proofs[combination]['verdict']}",
            file=sys.stderr,
            flush=True,
        )
    rows = []
    for stage, precision in dict.fromkeys((stage, precision) for stage, precision, _ in proofs):
        cells = []
        for procs in (1, 2, 4):
            proof = proofs.get((stage, precision, procs))
            cells.append(
                "not run" if proof is None else f"{len(proof['kills'])} kills: {proof['verdict']}"
            )
        rows.append([f"ZeRO {stage}, {precision}", *cells])
    kills = [kill for proof in proofs.values() for kill in proof["kills"]]
    equal = [
        kill for proof in proofs.values() if proof["verdict"] == "equal" for kill in proof["kills"]
    ]
    lost = sum(kill["after_step"] - kill["resumed_at_step"] for kill in kills)
    record(
        "prove_resume",
        "\n\n".join(
            [
                f"{machine('torch', 'deepspeed', 'transformers')} GPT-2 of 2 layers with "
                "dropout 0.1, 40 steps, a checkpoint every 3; "
                "killed from outside at random moments of random steps and started again by "
                "the same command.",
                table(["", "1 rank", "2 ranks", "4 ranks"], rows),
                f"{len(kills)} kills, {sum(kill['process'] == 'one rank' for kill in kills)} "
                f"of one rank alone; {lost} steps were made again. "
                "Bit for bit equal to the undisturbed twin, in every batch, learning rate, "
                f"loss, gradient norm, weight and moment: {len(equal)}, "
                f"{verdict(len(equal), at_least=len(kills))}.",
            ]
        ),
    )


if __name__ == "__main__":
    main()
