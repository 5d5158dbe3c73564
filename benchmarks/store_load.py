"""What one c10d store carries: many clients on loopback look as often as waiting ranks do.

    python -m benchmarks.store_load --clients 1000

Every client is a connection of its own, as a rank's. Each look is what a waiting rank does: two ``check`` calls.
Prints looks per second that the store can answer at most, and how late answers are at the rates in question.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

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


def measure(num_clients: int, num_processes: int) -> Iterator[tuple[float, list[float], float]]:
    """For each of PAUSES_S: the pause, sorted durations of all looks, the server's processor time per second."""
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
        yield pause_s, durations, (time.process_time() - used) / SECONDS
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before"
    print(f"{options.clients} clients in {options.processes} processes, {machine}\n")
    print("| a look every | looks per second | wanted | median ms | 99 % ms | server's core |")
    print("|---|---|---|---|---|---|")
    for pause_s, durations, used in measure(options.clients, options.processes):
        median, p99 = statistics.median(durations), durations[len(durations) * 99 // 100]
        wanted = f"{options.clients / pause_s:.0f}" if pause_s else "as many as it can"
        row = (f"{pause_s:g} s", f"{len(durations) / SECONDS:.0f}", wanted, f"{1e3 * median:.2f}", f"{1e3 * p99:.2f}")
        print(f"| {' | '.join(row)} | {100 * used:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
