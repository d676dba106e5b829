"""Simulate recoveries by seed: the product's own decisions under a fake clock, network and storage.

python scripts/run_simulation.py --seed 0 --count 20000     # the first broken promise ends it, exit status 1
python scripts/run_simulation.py --seed 7 --verbose         # tells what happens in one job
python scripts/run_simulation.py --case '{"seed":7,...}'    # a case that an earlier run has printed
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron.moevement.arguments import OneLineParser
from tests.simulation.case import Case, generate
from tests.simulation.run import Outcome, run_case, shrink


def main(argv: Sequence[str] | None = None) -> int:
    """Simulates; exit status 1 if a promise was broken."""
    parser = OneLineParser(prog="run_simulation.py", description="Simulate recoveries by seed.", allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--count", type=int, default=1, help="how many seeds in a row (default 1)")
    parser.add_argument("--case", default="", help="one case as JSON instead of seeds, as a failing run prints it")
    parser.add_argument("--verbose", action="store_true", help="tell what happens in each job")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("argument --count: at least 1")
    try:
        cases = [Case.from_json(args.case)] if args.case else None
    except (ValueError, TypeError, KeyError) as error:
        parser.error(f"argument --case: not a case as this script prints it ({error})")
    if cases is not None or args.verbose:
        failed = False
        for case in cases or map(generate, range(args.seed, args.seed + args.count)):
            print(case.to_json())
            outcome = run_case(case, trace=print)
            print(outcome.text or "every promise was kept")
            failed |= bool(outcome.kind)
        return int(failed)
    return _many(args.seed, args.count)


def _many(first: int, count: int) -> int:
    started = time.process_time()
    outcomes: list[Outcome] = []
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=count)
        for seed in range(first, first + count):
            case = generate(seed)
            outcome = run_case(case)
            if outcome.kind:
                progress.stop()
                return _broken(case, outcome)
            outcomes.append(outcome)
            progress.advance(task)
    seconds = time.process_time() - started
    recoveries = Counter(source for outcome in outcomes for source in outcome.sources)
    deaths = Counter(phase for outcome in outcomes for phase in outcome.died_in)
    print(f"{count} jobs, every promise kept, {60 * count / max(seconds, 1e-9):.0f} jobs a minute of processor time")
    print(f"recoveries: {_listed(recoveries)}; {sum(o.rolled_forward for o in outcomes)} ranks rolled forward")
    print(
        f"deaths: {_listed(deaths)}; {sum(o.probed for o in outcomes)} times asked whether a stage could recover alone"
    )
    return 0


def _broken(case: Case, outcome: Outcome) -> int:
    print(f"seed {case.seed}: {outcome.text}")
    small = shrink(case, outcome.kind)
    print(f"smallest case: {run_case(small).text}")
    print(f"python scripts/run_simulation.py --case '{small.to_json()}'")
    return 1


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"


if __name__ == "__main__":
    sys.exit(main())
