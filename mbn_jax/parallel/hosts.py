"""How the processes of one run, on one machine or many, find and leave each other."""

import collections
import os
import re
import sys
import threading
from collections.abc import Mapping
from typing import NoReturn

import jax

from mbn_jax.errors import UserError

SECONDS_TO_LEAVE = 10.0
"""After an error on this host, for the other hosts to come to their end too."""

LOST_HOST = re.compile(
    r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|coordination service", re.IGNORECASE
)
"""Words by which errors of JAX tell that the connection to another host is lost."""

SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


def launched_processes(environment: Mapping[str, str]) -> int | None:
    """Returns how many processes were launched as one, or None where no launcher says so.

    Of the launchers that JAX finds the others by, those that tell by environment variables: `srun`,
    `mpirun` of Open MPI 4, and TPU slices of Kubernetes. A TPU pod of Compute Engine tells only
    its metadata server, which is not asked unbidden.

    Args:
      environment: variables by name.

    >>> launched_processes({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"})
    4
    """
    if all(name in environment for name in SLURM):
        # Of the step: the shell of `salloc` is a step of one, whatever tasks its job has.
        return int(environment["SLURM_STEP_NUM_TASKS"])
    if all(name in environment for name in OPEN_MPI):
        return int(environment["OMPI_COMM_WORLD_SIZE"])
    if "TPU_WORKER_HOSTNAMES" in environment:
        hosts = len(environment["TPU_WORKER_HOSTNAMES"].split(","))
        return hosts * int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    return None


def join_hosts(
    distributed: bool | None,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the other processes of a run, where flags or the environment say that there are any.

    Args:
      distributed: True: JAX finds them by the cluster; False: there are none; None: as
        `launched_processes` finds, unless they are named:
      coordinator_address: address of the first process, HOST:PORT.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      heartbeat_timeout: seconds after which a host that is silent, or waits for the others at its
        end, ends them all.

    Raises:
      UserError: for half an answer, where the others are not found, or have more or fewer devices.
    """
    named = (coordinator_address, num_processes, process_id)
    is_named = any(value is not None for value in named)
    if is_named and distributed is not None:
        raise UserError(
            "--distributed finds the other hosts itself, and --no-distributed wants none; leave "
            "out --coordinator_address, --num_processes and --process_id."
        )
    if is_named and any(value is None for value in named):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id go together; give all three, "
            "or --distributed on a cluster."
        )
    if not is_named:
        launched = launched_processes(os.environ)
        if distributed is False or (distributed is None and (launched or 1) == 1):
            return
        # JAX would take SLURM_NTASKS, which may be the job's and not this step's.
        named = (None, launched, None)
    # JAX then aborts, without an exception: let the last line say what it was about.
    print("waiting for the other hosts, for 5 minutes at most", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            *named,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other hosts: {' '.join(str(error).split())}; name them by "
            "--coordinator_address, --num_processes and --process_id, or run this process alone "
            "with --no-distributed."
        ) from error
    devices = collections.Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise UserError(
            f"All hosts need as many devices, got {[devices[i] for i in sorted(devices)]}, in the "
            "order of the hosts; leave some out (CUDA_VISIBLE_DEVICES=0, for example)."
        )
    print(
        f"joined as host {jax.process_index()} of {jax.process_count()}, numbered from 0, with "
        f"{jax.local_device_count()} of {jax.device_count()} devices",
        file=sys.stderr,
        flush=True,
    )


def is_first_host() -> bool:
    """Returns whether this process is the first of the run, which speaks for all."""
    return jax.process_index() == 0


def lost_host(error: Exception) -> str | None:
    """Returns a sentence where the error says that another host is lost, else None."""
    # JAX raises RuntimeError or ValueError for a lost connection.
    if not jax.distributed.is_initialized() or not isinstance(error, RuntimeError | ValueError):
        return None
    if isinstance(error, UserError) or not LOST_HOST.search(str(error)):
        return None
    return (
        f"another host is lost ({str(error).splitlines()[0]}); start all of them again, and the "
        "run resumes from its last checkpoint"
    )


def leave(status: int) -> None:
    """Leaves the other hosts; ends the process where they do not come to their end in time."""
    if not jax.distributed.is_initialized():
        return
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(SECONDS_TO_LEAVE)
    if leaving.is_alive():
        exit_at_once(status)  # Peers notice the closed connection.


def exit_at_once(status: int) -> NoReturn:
    """Ends the process without a word to the other hosts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
