"""How much of a job's time goes into steps that count: forecast and simulation, to 4,096 nodes.

python benchmarks/goodput.py                 # the table of docs/launch.md
python benchmarks/goodput.py --restart-s 60 --stall-s 10 --spares 4
"""

import argparse

from launch.forecast import PUBLISHED_MTBF_H, best_interval, forecast, simulate

NODES = (2, 16, 128, 512, 1024, 2048, 4096)
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
    """Goodput at Young's interval, for each published rate of failures; in brackets as simulated."""
    print(
        f"detect {options.detect_s:.0f} s, restart {options.restart_s:.0f} s, stall {options.stall_s:.0f} s, "
        f"queue {options.queue_s:.0f} s, {options.spares} spares; goodput (simulated), in the queue, a failure in, save every\n"
    )
    print("| nodes of 8 GPUs |" + "".join(f" {name} |" for name in PUBLISHED_MTBF_H))
    print("|---|" + "---|" * len(PUBLISHED_MTBF_H))
    for nodes in NODES:
        cells = []
        for mtbf_h in PUBLISHED_MTBF_H.values():
            mean_s = mtbf_h * 3600 / nodes
            values = {
                "detect_s": options.detect_s,
                "restart_s": options.restart_s,
                "save_stall_s": options.stall_s,
                "save_every_s": best_interval(mean_s, options.stall_s),
                "queue_s": options.queue_s,
                "spares": options.spares,
            }
            expected = forecast(nodes, mtbf_h, **values)
            found = simulate(nodes, mtbf_h, **values, days=FAILURES * mean_s / 86400)
            cells.append(
                f" {expected.goodput:.1%} ({found.goodput:.1%}), {expected.queue:.1%}, {span(mean_s)}, {span(values['save_every_s'])} |"
            )
        print(f"| {nodes:,} |" + "".join(cells))


def span(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} d"


if __name__ == "__main__":
    main()
