"""The load that one c10d store carries: many clients on loopback look as often as waiting ranks do.

    python -m benchmarks.first_rank.store_load --clients 1000 --out docs/first_rank.md

Every client is a connection of its own, as a rank's. Each look is what a waiting rank does: two ``check`` calls.
Prints looks per second that the store can answer at most, and how late answers are at the rates in question.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from benchmarks import page
from benchmarks.first_rank.render import render

SECONDS = 4.0
PAUSES_S = (1.0, 0.5, 0.25, 0.1, 0.0)


def connect(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))


def client(store: dist.Store) -> None:
    store.check(["done"])
    store.check(["left"])


def look(port: int, num_clients: int, start, answers) -> None:
    """Be ``num_clients`` ranks, each of which looks as often as each of PAUSES_S says; 0 looks without pause."""
    stores = [connect(port) for _ in range(num_clients)]
    for pause_s in PAUSES_S:
        start.wait()
        begin, num_looks, durations = time.perf_counter(), 0, []
        while (now := time.perf_counter()) < begin + SECONDS:
            due = begin + num_looks * pause_s / num_clients
            if now < due:
                time.sleep(due - now)
            asked = time.perf_counter()
            client(stores[num_looks % num_clients])
            durations.append(time.perf_counter() - asked)
            num_looks += 1
        answers.put(durations)


def measure(num_clients: int, num_processes: int) -> Iterator[dict[str, float]]:
    """For each of PAUSES_S: looks per second, how long they took, and the server's processor time per second."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(num_processes + 1), context.Queue()
    arguments = (server.port, num_clients // num_processes, start, answers)
    processes = [context.Process(target=look, args=arguments) for _ in range(num_processes)]
    for process in processes:
        process.start()
    for pause_s in PAUSES_S:
        start.wait()
        used = time.process_time()
        durations = sorted(duration for _ in processes for duration in answers.get())
        yield {
            "pause_s": pause_s,
            "looks_per_s": len(durations) / SECONDS,
            "median_ms": 1e3 * statistics.median(durations),
            "p99_ms": 1e3 * durations[len(durations) * 99 // 100],
            "server_share": (time.process_time() - used) / SECONDS,
        }
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=8)
    page.add_arguments(parser)
    options = parser.parse_args()
    data = page.load(options.out)
    if not options.render:
        found = {"measured": page.provenance("benchmarks.first_rank.store_load", options), "rows": []}
        data["store_load"] = found | {"clients": options.clients, "processes": options.processes}
        for row in measure(options.clients, options.processes):
            found["rows"].append(row)
            print(row, flush=True)
    page.publish(options.out, data, lambda data: render(data, options.out.read_text()))


if __name__ == "__main__":
    main()
