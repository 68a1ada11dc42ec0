"""Ask a server (serve.py) from several clients at once; print rows/s and the median and 99th percentile of a request.

python examples/load_test.py new.csv --text_column comment --clients 2 --requests 500

One text a request, each on a kept connection. docs/shipping.md has measured figures. Standard library only.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import itertools
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor


def ask(address: str, texts: list[str]) -> list[float]:
    """Send each text by itself over one connection; return the seconds of every request."""
    connection = http.client.HTTPConnection(address, timeout=60)
    seconds = []
    for text in texts:
        body = json.dumps({"texts": [text]}).encode()
        started = time.perf_counter()
        connection.request("POST", "/classify", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        seconds.append(time.perf_counter() - started)
        if response.status != 200:
            raise SystemExit(f"{address}: status {response.status}: {content[:200]!r}")
    connection.close()
    return seconds


def run(address: str, texts: list[str], clients: int, requests: int) -> dict[str, float]:
    """Return rows/s, and p50 and p99 of a request in ms, after some requests that are not counted."""
    asked = list(itertools.islice(itertools.cycle(texts), requests))
    ask(address, asked[:20])
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        spent = [
            second for part in pool.map(lambda first: ask(address, asked[first::clients]), range(clients)) for second in part
        ]
    elapsed = time.perf_counter() - started
    cuts = statistics.quantiles(spent, n=100, method="inclusive")
    return {"rows_per_s": len(spent) / elapsed, "p50_ms": 1000 * statistics.median(spent), "p99_ms": 1000 * cuts[98]}


def main() -> None:
    """Read the flags and the table, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="CSV whose texts are asked")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--address", default="localhost:8000", help="host and port of the server")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--requests", type=int, default=500, help="of all clients together")
    arguments = parser.parse_args()
    with open(arguments.table, encoding="utf-8", newline="") as file:
        texts = [row[arguments.text_column] for row in itertools.islice(csv.DictReader(file), 5000)]
    found = run(arguments.address, texts, arguments.clients, arguments.requests)
    print(json.dumps({"clients": arguments.clients, "requests": arguments.requests} | {k: round(v, 2) for k, v in found.items()}))


if __name__ == "__main__":
    main()
