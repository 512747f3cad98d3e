"""How often a model timed against itself comes out even here: python -m bench.self_check MODEL.onnx --repeats 20

Says whether this machine, as busy as it is now, is fit for measuring. About 19 of 20 should hold 1.00.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="timed per session in each repeat")
    parser.add_argument("--runtime", default="ort-cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()

    from bench.inputs import graph_inputs, make_inputs
    from bench.stats import written
    from bench.timing import measure
    from deploy_prune.errors import DeployPruneError

    held: list[bool] = []
    off: list[float] = []
    try:
        inputs = make_inputs(graph_inputs(options.model), batch=options.batch, sequence=options.seq)
        for seed in range(options.repeats):
            load = os.getloadavg()[0]
            report = measure(
                {options.model.stem: options.model},
                inputs,
                runtime=options.runtime,
                seed=seed,
                seconds=options.seconds,
                threads=options.threads,
            )
            rounds, _, calls = report.samples.ns.shape
            held.append(report.self_check.holds_one)
            off.append(abs(report.self_check.value - 1))
            print(
                f"{written(report.self_check)}  {'holds' if held[-1] else 'MISSES'} 1; {rounds} rounds of {calls}, "
                f"p50 {report.latencies[0].p50_ms:.3f} ms, load {load:.1f}",
                flush=True,
            )
    except DeployPruneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if held:
        print(
            f"held 1.00 in {sum(held)} of {len(held)}; the estimate missed 1 by {100 * statistics.median(off):.1f} % "
            f"(median), {100 * max(off):.1f} % (worst)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
