"""How long a scrape takes over thousands of runs, of which few are running.

    python -m tests.benchmarks.exporter [--runs 5000] [--running 50]

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from cluster.exporter import serving
from cluster.records import StatusWriter
from tests.scrapes import CLASSIFIED, text


def measure(runs: int, running: int, scrapes: int = 5) -> dict[str, float]:
    """Seconds of the first scrape, of the median of ``scrapes`` more, and the size of one in bytes."""
    with tempfile.TemporaryDirectory() as root:
        writer = StatusWriter(Path(root) / "first", "classify", **CLASSIFIED)
        status = writer.status.model_dump()
        ended = status | {"state": "done", "updated": time.time() - 7 * 24 * 3600}
        for number in range(1, runs):
            folder = Path(root) / f"run-{number}"
            folder.mkdir()
            (folder / "status.json").write_text(json.dumps(status if number < running else ended))
        with serving([root], port=0) as url:
            seconds = []
            for _ in range(1 + scrapes):
                for number in range(1, running):  # those that run have written again since
                    (Path(root) / f"run-{number}" / "status.json").write_text(json.dumps(status))
                began = time.perf_counter()
                scraped = text(url)
                seconds.append(time.perf_counter() - began)
    first, *later = seconds
    return {
        "runs": runs,
        "running": running,
        "first": first,
        "later": sorted(later)[scrapes // 2],
        "bytes": len(scraped),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--running", type=int, default=50)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.runs, arguments.running)))


if __name__ == "__main__":
    main()
