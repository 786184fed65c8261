"""Several processes: how they find each other, agree on what one of them decides, and end together.

A run over several machines is the same command on each of them: one mesh lies over the devices of all. They
find each other by themselves where a launcher knows them (SLURM's `srun`, Open MPI, a TPU pod, an indexed Job
or JobSet of Kubernetes), else by three environment variables:

    JAX_COORDINATOR_ADDRESS=HOST:PORT   of process 0, any free port
    JAX_NUM_PROCESSES=2
    JAX_PROCESS_ID=0                    another one in each process, from 0

JAX lets a process wait for a lost one until heartbeats have failed to come for 100 s, then aborts it amid a
stack trace. Here every process keeps a connection with the first one, which the operating system closes when
either ends: all end within moments, with a line that names the one that is gone.
"""

import contextlib
import itertools
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener, wait
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed  # which launcher this is, and the store that all processes share

from moe.errors import UNFINISHED, UserError, ending, one_line

Ending = tuple[int, str]  # exit code and reason

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
ADVICE = (
    ", and the others cannot go on without it; the same command goes on from the newest checkpoint, with any "
    "number of processes"
)
GRACE = 5  # seconds that a process which ends gives the others to end, or to tell that one is gone
PATIENCE = 24 * 3600 * 1000  # milliseconds for the first process to decide; if it is gone, the watch tells

_decisions = itertools.count()


@contextlib.contextmanager
def joined(*, agree_on_sigterm: bool = False, start_seconds: int = 300) -> Iterator[None]:
    """Joins the other processes, if this is one of several, for all that stands in the context.

    In it only the first process writes to standard output. If an exception leaves it, here or in another
    process, all end with the exit code that `run_main` gives; with `UNFINISHED` where a process is gone.

    Args:
        agree_on_sigterm: a SIGTERM to any process ends none: the loop asks `reached_preemption_sync_point`.
        start_seconds: how long to wait for the others.

    Raises:
        UserError: the environment variables are no good, or the others do not come.
    """
    if not _connect(agree_on_sigterm, start_seconds):
        yield
        return
    watch = _Watch()
    try:
        with _quiet_unless_first():
            yield
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(GRACE)  # a collective may have failed since a process is gone: then the watch ends us
        watch.end(error)
    watch.leave()
    jax.distributed.shutdown()  # waits for the others


def first() -> bool:
    """Whether this is the first process, the one that writes files."""
    return jax.process_index() == 0


def first_decides[T](decide: Callable[[], T]) -> T:
    """What the first process decides, in every process: all must ask, none but the first calls `decide`.

    What is decided must be JSON-able.
    """
    if not jax.distributed.is_initialized():
        return decide()
    store, key = distributed.global_state.client, f"switchyard/decided/{next(_decisions)}"
    assert store is not None
    if first():
        store.key_value_set(key, json.dumps(decide()))
    return json.loads(store.blocking_key_value_get(key, PATIENCE))


def name() -> str:
    """This process, for a person."""
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


def _connect(agree_on_sigterm: bool, start_seconds: int) -> bool:
    """Initialises JAX's distributed runtime where there are several processes; returns whether there are."""
    address, count, index = _given()
    if count == 1 or (count is None and not _found()):
        return False
    jax.config.update("jax_enable_preemption_service", agree_on_sigterm)
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Between simulated devices each collective under way blocks a thread, and XLA has one for each core:
        # on few cores all would wait for one that none is left to begin.
        os.environ.setdefault("NPROC", "64")
    # JAX itself aborts the process when its time is over.
    waiting = threading.Timer(start_seconds, _give_up, [start_seconds])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            local_device_ids=[] if _alone_on_node() else None,
            cluster_detection_method=None if count is None else "deactivate",
            initialization_timeout=start_seconds + 60,
        )
    finally:
        waiting.cancel()
    return True


def _alone_on_node() -> bool:
    """Whether SLURM runs one task a node: it takes all GPUs, where JAX would take the one of its number."""
    tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    return tasks is not None and tasks == nodes and "JAX_LOCAL_DEVICE_IDS" not in os.environ


def _give_up(seconds: int) -> NoReturn:
    state = distributed.global_state
    print(
        f"error: process {state.process_id} waited {seconds} s to meet all others at "
        f"{state.coordinator_address}; start every one of them, on machines that reach this address",
        file=sys.stderr,
    )
    _exit(2)


def _given() -> tuple[str | None, int | None, int | None]:
    """Address, number and index that the environment gives; None where a launcher is to be asked.

    Raises:
        UserError: some are missing, or no good.
    """
    given = {variable: os.environ.get(variable, "") for variable in (ADDRESS, COUNT, INDEX)}
    if not (given[COUNT] or given[INDEX]):
        return None, None, None
    for variable, value in given.items():
        fine = value.rpartition(":")[2].isdecimal() and (":" in value) == (variable == ADDRESS)
        if not fine:
            what = "HOST:PORT of process 0" if variable == ADDRESS else "a number"
            raise UserError(
                f"{variable}={value!r}: set it to {what}; {ADDRESS}, {COUNT} and {INDEX} go together"
            )
    count, index = int(given[COUNT]), int(given[INDEX])
    if index >= count:
        raise UserError(f"{INDEX}={index}: the {COUNT}={count} processes count from 0")
    if index == 0 and count > 1:  # where the port is taken, JAX crashes
        try:
            socket.create_server(("", int(given[ADDRESS].rpartition(":")[2]))).close()
        except OSError as error:
            raise UserError(f"{ADDRESS}={given[ADDRESS]}: {error.strerror}; choose another port") from error
    return given[ADDRESS], count, index


def _found() -> bool:
    """Whether a launcher that JAX knows has started this process as one of several."""
    for launcher in clusters.ClusterEnv._cluster_types:
        # Kubernetes is asked only in an indexed Job; a notebook in a pod is no process of several.
        elsewhere = launcher is clusters.K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ
        if not launcher.opt_in_only_method and not elsewhere and launcher.is_env_present():
            return launcher.get_process_count() > 1
    return False


@contextlib.contextmanager
def _quiet_unless_first() -> Iterator[None]:
    if first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield


class _Watch:
    """This process's connections: of the first with every other, of another with the first.

    A thread listens. A peer's last word is null when it is done, exit code and reason if it ends early; one
    that leaves without a word is gone. The first process passes on what ends the run, and leaves last: JAX
    aborts the others when it does.
    """

    def __init__(self):
        self._peers = _meet()
        self._heard: set[Any] = set()
        self._ends: Ending | None = None
        self._ends_here = False
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Says that this process is done."""
        self._tell(None)

    def end(self, error: BaseException) -> NoReturn:
        """Ends this process as `run_main` would, and all others."""
        code, words = ending(error)
        self._ends_here = True
        if words is None:
            traceback.print_exception(error)
        else:
            print(words, end="", file=sys.stderr)
        self._tell((code, f"{name()} ended: {one_line(error) or type(error).__name__}"))
        if first():
            self._thread.join(GRACE)
        _exit(code)

    def _listen(self) -> None:
        while self._peers and (ready := wait(list(self._peers), GRACE if self._ends else None)):
            for peer in ready:
                ends = self._hear(peer)
                if ends and not self._ends:
                    print(f"error: {ends[1]}", file=sys.stderr)
                    self._tell(ends)
            if self._ends and not first():
                break
        if self._ends and not self._ends_here:
            _exit(self._ends[0])

    def _hear(self, peer: Any) -> Ending | None:
        """What ends the run, if this peer ends it."""
        try:
            ends = json.loads(peer.recv_bytes())
        except (EOFError, OSError):
            who = self._peers.pop(peer)
            return None if peer in self._heard else (UNFINISHED, f"{who} is gone{ADVICE}")
        self._heard.add(peer)
        return tuple(ends) if ends else None

    def _tell(self, ends: Ending | None) -> None:
        self._ends = ends
        for peer in list(self._peers):
            with contextlib.suppress(OSError):
                peer.send_bytes(json.dumps(ends).encode())


def _meet() -> dict[Any, str]:
    """Connects the first process with every other: this one's connections, and with whom."""
    store, address = distributed.global_state.client, distributed.global_state.coordinator_address
    assert store is not None
    assert address is not None
    count, key = jax.process_count(), "switchyard/watch"
    if not first():
        port, secret = json.loads(store.blocking_key_value_get(key, PATIENCE))
        host = address.rpartition(":")[0].strip("[]")
        peer = Client((host, port), authkey=secret.encode())
        peer.send_bytes(name().encode())
        return {peer: f"process 0 of {count} on {host}"}
    peers, secret = {}, secrets.token_hex()
    with Listener(("", 0), backlog=count, authkey=secret.encode()) as listener:
        store.key_value_set(key, json.dumps([listener.address[1], secret]))
        while len(peers) < count - 1:
            with contextlib.suppress(AuthenticationError, OSError, EOFError):  # a stranger
                peer = listener.accept()
                peers[peer] = peer.recv_bytes().decode()
    return peers


def _exit(code: int) -> NoReturn:
    """Ends the process where it stands: what is left running waits for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
