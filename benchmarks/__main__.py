"""The command line: `python -m benchmarks WORKLOAD`.

WORKLOAD is stack, unrolled, encoder, matrix, scaling or tunix.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from benchmarks.encoder import Encoder
from benchmarks.matrix import Matrix
from benchmarks.scaling import Scaling
from benchmarks.stack import Stack
from benchmarks.tunix import Tunix
from benchmarks.unrolled import Unrolled
from experiments import ExperimentError

Workloads = Stack | Unrolled | Encoder | Matrix | Scaling | Tunix
Workload = Annotated[Workloads, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes]


def parse(arguments: Sequence[str] | None = None) -> Workloads:
    """The workload of a command line, of the process's own if None."""
    return tyro.cli(Workload, prog="python -m benchmarks", description=__doc__, args=arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status."""
    workload = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    try:
        workload.run(console)
    except (ExperimentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "interrupted: the rows that were measured are in the table; the same command begins anew",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
