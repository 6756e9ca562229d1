"""
Curvature over several processes
================================

Two processes share the digits: each has the whole net and a part of the images, of its
own size. All operators are those of all images, and both processes have the same
vectors. What each holds is printed, and everything is compared with one process.

::

    make distributed
    python examples/distributed.py [--processes 2]
    torchrun --nproc-per-node 2 examples/distributed.py
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys

import torch
import torch.distributed as dist
from _digits import digits, train
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import vivit_linop as vl

NUM_SAMPLES, DAMPING, K = 100, 1e-2, 5

# %%
# What each process does
# ----------------------


def work() -> None:
    """What each process does; up to the comparison it is what one would write."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    # The same net on all of them; a checkpoint would do as well.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))
    loss, (X, y) = nn.CrossEntropyLoss(), digits(NUM_SAMPLES)
    train(net, lambda: loss(net(X), y), steps=100)

    # Parts of different sizes: the first process has twice as many as the others.
    cuts = [2 * NUM_SAMPLES // (size + 1)]
    cuts += [
        (NUM_SAMPLES - cuts[0]) * r // (size - 1) + cuts[0] for r in range(1, size)
    ]
    own = torch.arange(NUM_SAMPLES).tensor_split(cuts[: size - 1])[rank]
    data = [(X[i], y[i]) for i in own.split(50)]
    risk = vl.EmpiricalRisk(net, loss, data, process_group=dist.group.WORLD)

    G, D = vl.GGN(risk), risk.num_params
    g = risk.gradient()
    step = (G + DAMPING * vl.Identity(D)).inv() @ g
    pairs = G.eigh(k=K)
    gammas, lambdas = vl.directional_derivatives(risk, pairs)
    # A solver of SciPy's runs on one of them, the others help it to multiply.
    largest, _ = vl.led(lambda A: eigsh(A, k=K), G)

    K_rows = G.gram.rows
    rows = K_rows.own.shape if K_rows is not None else G.gram.matrix.shape
    said = (
        f"rank {rank} of {size}: {len(own)} of {risk.num_samples} images, "
        f"{rows[0]} of {G.gram.shape[0]} rows of K"
    )
    for line in gathered(said):
        if rank == 0:
            print(line)

    alone = vl.EmpiricalRisk(net, loss, (X, y))
    G1 = vl.GGN(alone)
    step1 = (G1 + DAMPING * vl.Identity(D)).inv() @ alone.gradient()
    gammas1, lambdas1 = vl.directional_derivatives(alone, G1.eigh(k=K))
    evals = G1.eigvalsh()[-K:]
    compared = {
        "gradient": difference(g, alone.gradient()),
        "Newton step": difference(step, step1),
        "eigenvalues": difference(pairs.eigenvalues, evals),
        "by SciPy": difference(torch.from_numpy(largest).sort().values, evals),
        "γ": difference(gammas.abs(), gammas1.abs()),
        "λ": difference(lambdas, lambdas1),
    }
    worst = {what: max(gathered(error)) for what, error in compared.items()}
    for what, error in worst.items():
        if rank == 0:
            print(f"{what:12} of {size} processes and of one differ by {error:.1e}")
    same = len(set(gathered(step.numpy().tobytes()))) == 1
    if rank == 0:
        print("the step is the same on all of them, to the bit:", same)
    assert same
    assert max(worst.values()) < 1e-10
    dist.barrier()
    dist.destroy_process_group()


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative to what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def gathered(item: object) -> list:
    """What each process has."""
    every = [item] * dist.get_world_size()
    dist.all_gather_object(every, item)
    return every


# %%
# Starting the processes
# ----------------------
# Unless torchrun has done so.


def start() -> str:
    """Run this script in several processes; returns what they print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    processes = str(parser.parse_args().processes)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, processes, sys.argv[0]]
    finished = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True
    )
    if finished.returncode:
        sys.exit(finished.returncode)
    return finished.stdout


if "RANK" in os.environ:
    work()
    # Threads of gloo may abort a process that ends in the usual way, all work done.
    sys.stdout.flush()
    os._exit(0)
else:
    said = start()
    print(said)

# %%
# The picture
# -----------
# The rows of K, by the process that holds them.

if "RANK" not in os.environ:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held = [int(rows) for rows in re.findall(r"(\d+) of \d+ rows of K", said)]
    figure, ax = plt.subplots(figsize=(4, 4), layout="constrained")
    for rank, rows in enumerate(held):
        ax.barh(-sum(held[:rank]), sum(held), -rows, align="edge", label=f"rank {rank}")
    ax.set(xlabel="column of K", ylabel="− row of K", title="Who holds which rows of K")
    ax.legend()
