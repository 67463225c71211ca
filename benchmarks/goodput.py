"""How much of a job's time goes into steps that count: forecast and simulation, to 4,096 nodes.

python benchmarks/goodput.py                 # the table of docs/launch.md
python benchmarks/goodput.py --restart-s 60 --stall-s 10 --spares 4
"""

import argparse

from launch.forecast import PUBLISHED_MTBF_H, best_interval, forecast, simulate

NODES = (2, 16, 128, 512, 1024, 4096)
# SlurmdTimeout=300: noticed after 1.3 to 3 times that; then cred_expire (120 s), and the start.
SLURM_ALONE = {"detect_s": 600.0, "restart_s": 240.0, "spares": 0}
FAILURES = 4000  # of each simulated job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detect-s", type=float, default=5, help="until a failure is noticed (5)")
    parser.add_argument("--restart-s", type=float, default=120, help="from there to the next step (120)")
    parser.add_argument("--stall-s", type=float, default=30, help="training stands still for a save (30)")
    parser.add_argument("--queue-s", type=float, default=3600, help="for another allocation (3600)")
    parser.add_argument("--spares", type=int, default=4, help="spare nodes in the allocation (4)")
    options = parser.parse_args()
    print_table(options)


def print_table(options: argparse.Namespace) -> None:
    """Goodput at Young's interval for each published rate of failures, with this launcher and with Slurm's requeue alone."""
    shared = {"save_stall_s": options.stall_s, "queue_s": options.queue_s}
    ways = {
        "": {"detect_s": options.detect_s, "restart_s": options.restart_s, "spares": options.spares, **shared},
        ", Slurm alone": {**SLURM_ALONE, **shared},
    }
    print("| nodes of 8 GPUs |" + "".join(f" {name}{way} |" for name in PUBLISHED_MTBF_H for way in ways))
    print("|---|" + "---|" * len(PUBLISHED_MTBF_H) * len(ways))
    for nodes in NODES:
        cells = []
        for mtbf_h in PUBLISHED_MTBF_H.values():
            mean_s = mtbf_h * 3600 / nodes
            for values in ways.values():
                values = {**values, "save_every_s": best_interval(mean_s, options.stall_s)}
                expected = forecast(nodes, mtbf_h, **values)
                found = simulate(nodes, mtbf_h, **values, days=FAILURES * mean_s / 86400)
                cells.append(f" {expected.goodput:.1%} ({found.goodput:.1%}), {expected.queue:.1%} |")
        print(f"| {nodes:,} |" + "".join(cells))
    for name, mtbf_h in PUBLISHED_MTBF_H.items():
        print(
            f"{name}: a node fails once in {mtbf_h:,.0f} h; "
            + ", ".join(f"one of {n:,} in {span(mtbf_h * 3600 / n)}" for n in NODES)
        )


def span(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} d"


if __name__ == "__main__":
    main()
