"""What the fit's cluster is: slots, addresses, what of the environment ranks see. On the driver."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pyspark import RDD, SparkConf, SparkContext, TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_mnist import errors, events, interrupts, options

logger = logging.getLogger(__name__)

SLOTS_TIMEOUT = 4.0
"""Seconds that executors which are still starting get to offer their slots."""
BUSY_TIMEOUT = 600.0
"""Seconds that a fit without ``num_proc`` waits for other jobs, rather than train with fewer."""
RANK_WORKERS = "SPARK_MNIST_RANK_WORKERS"
"""A variable that tells the Python workers of ranks from others."""
T = TypeVar("T")
INSTEAD = {
    "pandas.": "use spark.createDataFrame(...)",
    "pyspark.pandas": "use .to_spark()",
    "pyspark.core.rdd": "use .toDF()",
    "pyspark.rdd": "use .toDF()",
    "pyspark.sql.group": "aggregate it first",
    "builtins.str": "the DataFrame comes first, then the model's name; read a path with spark.read",
    "builtins.list": "use spark.createDataFrame(...)",
    "builtins.dict": "use spark.createDataFrame(...)",
    "numpy.": "use spark.createDataFrame(...)",
    "builtins.NoneType": "read or make one first",
}
"""What to do with other things that hold rows, by the beginning of their type's name."""
SECURE = ("spark.authenticate", "spark.network.crypto.enabled")
"""Settings without which others on the network may read, or send, what driver and executors do."""
TASK_GPUS = "spark.task.resource.gpu.amount"
"""GPUs that Spark gives a task."""
RANK_ENVIRONMENT = (
    "PATH|HOME|USER|LOGNAME|LANG|LC_.*|TZ|TMPDIR|LD_LIBRARY_PATH|JAVA_HOME|CLASSPATH|"
    "SSL_CERT_.*|REQUESTS_CA_BUNDLE|(?i:(http|https|no|all)_proxy)|KRB5.*|ARROW_LIBHDFS_DIR|"
    "PYTHON.*|(SPARK|PYSPARK|HADOOP|HOROVOD|CUDA|NVIDIA|NCCL|GLOO|TF|KERAS|XLA|OMP|MKL)_.*"
)
"""What a rank keeps of its executor's environment, where the name is not that of a secret."""
SECRET = ".*(SECRET|PASS|CREDENTIAL|_KEY|TOKEN(?!_FILE)).*"
"""Names of what a rank does not keep, whatever else they match."""
EXECUTOR_ENV = "spark.executorEnv."
"""Spark settings that give executors more, which ranks keep."""
CREDENTIALS = {
    **dict.fromkeys(("s3", "s3a"), "AWS_"),
    **dict.fromkeys(("gs", "gcs"), "GOOGLE_"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "AZURE_"),
}
"""What variables begin with by which ranks open shards on an object store, by its scheme."""


def check_settings(spark: SparkSession, *, secure: bool) -> None:
    """Refuse a session in which ranks could not run, or not as the user wants.

    Args:
        spark: The session.
        secure: Whether Spark must authenticate and encrypt its connections.

    Raises:
        errors.ClusterError: A setting must change; the message names it.
    """
    conf = spark.sparkContext.getConf()
    if _is_on(conf, "spark.speculation"):
        raise errors.ClusterError(
            "spark.speculation=true makes Spark start slow tasks twice, and a rank is a task that "
            "must run once: set it to false for this session"
        )
    gpus = conf.get(TASK_GPUS)
    if gpus and 0 < float(gpus) < 1:
        raise errors.ClusterError(
            f"{TASK_GPUS}={gpus} lets Spark give one GPU to several ranks: set it to 1"
        )
    missing = [setting for setting in SECURE if not _is_on(conf, setting)]
    if secure and missing:
        raise errors.ClusterError(
            f"secure=true needs {' and '.join(f'{setting}=true' for setting in missing)}: set it "
            "where the session is made, since Spark's connections carry the keys of a fit"
        )


def check_input(df: object, *, streams: bool = False) -> None:
    """Refuse what is no DataFrame that can be read now.

    Args:
        df: What the user gave.
        streams: Whether it may be a stream's.

    Raises:
        errors.NotADataFrame: It is something else, or a stream.
        errors.ClusterError: Its session was stopped.
    """
    kind = f"{type(df).__module__}.{type(df).__qualname__}"
    if kind.startswith("pyspark.sql.connect"):  # refused with its session, see ``settings``
        return
    if not isinstance(df, DataFrame):
        hints = [hint for start, hint in INSTEAD.items() if kind.startswith(start)]
        hint = hints[0] if hints else "give a Spark DataFrame"
        raise errors.NotADataFrame(f"the input must be a Spark DataFrame, not {kind}: {hint}")
    check_session(df.sparkSession)
    if df.isStreaming and not streams:
        raise errors.NotADataFrame(
            "the DataFrame is a stream, which has no end: train and evaluate on its parts with "
            "writeStream.foreachBatch, as examples/learn_from_stream.py does"
        )


def check_session(spark: object) -> None:
    """Refuse what is no session, or one that was stopped.

    Raises:
        errors.ClusterError: It is.
    """
    if type(spark).__module__.startswith("pyspark.sql.connect"):
        return
    if not isinstance(spark, SparkSession):
        raise errors.ClusterError(
            f"a SparkSession is needed, not {type(spark).__qualname__}: give spark"
        )
    context = spark.sparkContext
    if context._jsc is None or context._jsc.sc().isStopped():
        raise errors.ClusterError(
            "the Spark session was stopped: make a new one, and read the data again with it"
        )


def settings(spark: SparkSession) -> dict[str, str]:
    """The options that are set for all of the session's work, as text by name.

    Raises:
        errors.UnknownOption: There is no option for a setting.
        errors.ClusterError: The session is one of Spark Connect.
    """
    if type(spark).__module__.startswith("pyspark.sql.connect"):
        raise errors.ClusterError(
            "this session is Spark Connect's, as serverless and shared compute have it: it has no "
            "tasks for ranks to run in. Use classic compute, on Databricks with dedicated access"
        )
    rows = spark.sql("SET").where(F.col("key").startswith(options.SETTING)).collect()
    found = {row["key"].removeprefix(options.SETTING): row["value"] for row in rows}
    for name in found:
        if name not in options.FIELDS:
            hint = errors.did_you_mean(name, options.FIELDS)
            raise errors.UnknownOption(
                f"Spark's setting {options.SETTING}{name}: no option {name!r}{hint}"
            )
    return found


def slots(spark: SparkSession) -> int:
    """How many tasks the session can run at the same time, on the executors it has now."""
    context = spark.sparkContext._jsc.sc()
    profile = context.resourceProfileManager().defaultResourceProfile()
    found: int = context.maxNumConcurrentTasks(profile)
    return found


def executors(spark: SparkSession) -> list[str]:
    """The address of each executor that the session has now, in order."""
    infos = spark.sparkContext._jsc.sc().statusTracker().getExecutorInfos()
    return sorted(f"{info.host()}:{info.port()}" for info in infos)


def free_slots(spark: SparkSession) -> int:
    """How many of the slots no task runs in, or waits for."""
    tracker = spark.sparkContext.statusTracker()
    stages = [tracker.getStageInfo(number) for number in tracker.getActiveStageIds()]
    left = sum(stage.numTasks - stage.numCompletedTasks for stage in stages if stage)
    return max(0, slots(spark) - left)


def in_rank_workers(rdd: RDD[T]) -> RDD[T]:
    """Let the tasks of an RDD run in Python workers that run nothing else but ranks' tasks.

    Spark uses workers again for tasks of equal environment, the longest unused first. Among those
    of all jobs a worker with a warm server would rarely be met again, and others would start one.
    """
    environment = rdd.context.environment
    environment[RANK_WORKERS] = "1"
    try:
        rdd.id()  # Spark notes the environment here
    finally:
        environment.pop(RANK_WORKERS, None)
    return rdd


def task_cpus(context: SparkContext) -> int:
    """Cores that Spark gives a task."""
    return int(context.getConf().get("spark.task.cpus", "1"))


def wait_for_slots(spark: SparkSession, ranks: int, seconds: float = SLOTS_TIMEOUT) -> None:
    """Wait until so many ranks could run.

    Raises:
        errors.TooFewSlots: They could not within that time.
    """
    deadline, logged = time.monotonic() + seconds, False
    while (free := free_slots(spark)) < ranks:
        if slots(spark) >= ranks and not logged and seconds > SLOTS_TIMEOUT:
            logger.info(
                "waiting for other jobs: %d of the %d slots that the ranks need are free",
                *(free, ranks),
            )
            logged = True
        interrupts.check()
        if time.monotonic() > deadline:
            raise errors.TooFewSlots(_too_few(spark, ranks, free))
        time.sleep(0.1)


def ranks(spark: SparkSession, num_proc: int | None) -> int:
    """Return the number of ranks to run: the given one, or all slots, busy or not.

    Raises:
        errors.TooFewSlots: They could not all run at once, so training could not start.
    """
    if num_proc:
        wait_for_slots(spark, num_proc)
        return num_proc
    deadline = time.monotonic() + SLOTS_TIMEOUT
    while not (num_slots := slots(spark)):
        if time.monotonic() > deadline:
            raise errors.TooFewSlots(_too_few(spark, 1, 0))
        time.sleep(0.1)
    return num_slots


def _too_few(spark: SparkSession, ranks: int, free: int) -> str:
    have = slots(spark)
    busy = f", {free} of them free" if free < have else ""
    wait = "wait for the jobs that use them, " if free < have else ""
    lower = "lower num_proc, " if ranks > 1 else ""
    message = (
        f"num_proc={ranks} ranks must run at the same time, and Spark has {have} slots{busy}: "
        f"{wait}{lower}or give the session more executors or cores"
    )
    gpus = spark.sparkContext.getConf().get(TASK_GPUS)
    if gpus:
        message = f"{message}; each takes {TASK_GPUS}={gpus} of its GPUs, too"
    setting = "spark.dynamicAllocation.enabled"
    if _is_on(spark.sparkContext.getConf(), setting):
        return (
            f"{message}. With {setting}=true it has only the executors that its last jobs needed: "
            "set spark.dynamicAllocation.minExecutors to what the ranks need"
        )
    return message


def _is_on(conf: SparkConf, setting: str) -> bool:
    return str(conf.get(setting, "false")).lower() == "true"


def driver_address(spark: SparkSession) -> tuple[str, str]:
    """Return where executors reach the driver, and the address on which it listens."""
    conf = spark.sparkContext.getConf()
    host = str(conf.get("spark.driver.host"))
    return host, str(conf.get("spark.driver.bindAddress", host))


def inbox(
    spark: SparkSession,
    ports: Sequence[int],
    receive: Callable[[events.Event], None],
    answer: Callable[[bytes], bytes | None],
) -> events.Inbox:
    """Listen for ranks and agents where executors reach the driver; see ``events.Inbox``.

    Raises:
        errors.ClusterError: No port is free.
    """
    host, bind = driver_address(spark)
    try:
        return events.Inbox(host, bind, receive, answer, ports)
    except OSError as error:
        raise _cannot_listen(ports, bind, error) from error


def check_port(spark: SparkSession, ports: Sequence[int]) -> None:
    """Refuse an address or ports on which the driver could not listen for its ranks.

    Raises:
        errors.ClusterError: The driver has no IPv4 address, or none of the ports is free.
    """
    host, bind = driver_address(spark)
    for setting, address in (("spark.driver.host", host), ("spark.driver.bindAddress", bind)):
        try:
            socket.getaddrinfo(address, None, socket.AF_INET)
        except OSError as error:
            raise errors.ClusterError(
                f"{setting}={address} has no IPv4 address ({error}), and ranks find each other "
                "over IPv4 alone: set it to an address, or a name, that executors reach over IPv4"
            ) from error
    try:
        events.listen(bind, ports).close()
    except OSError as error:
        raise _cannot_listen(ports, bind, error) from error


def _cannot_listen(ports: Sequence[int], bind: str, error: OSError) -> errors.ClusterError:
    where = f"port {ports[0]}" if len(ports) == 1 else f"a port of {ports[0]} to {ports[-1]}"
    return errors.ClusterError(
        f"the driver cannot listen on {where} of {bind} ({error.strerror}): give port, or Spark's "
        "setting spark.mnist.port, a range with a free port for each fit that runs on this machine"
    )


def task_gpus() -> tuple[str, ...]:
    """In a task: the addresses of the GPUs that Spark gave it, where it gives any."""
    context = TaskContext.get()
    gpus = context.resources().get("gpu") if context else None
    return tuple(gpus.addresses) if gpus else ()


def host_and_gpus() -> str:
    """In a task: the name of its machine, and its GPUs."""
    name, gpus = socket.gethostname(), task_gpus()
    return f"{name} (GPU {', '.join(gpus)})" if gpus else name


def rank_environment() -> dict[str, str]:
    """What a rank gets of the driver's environment."""
    name = "TF_CPP_MIN_LOG_LEVEL"
    return {name: os.environ.get(name, "3")}


def kept_names(spark: SparkSession, url: str) -> str:
    """A pattern for the variables that ranks keep of their executor's environment.

    Args:
        spark: The session.
        url: Where the shards lie.
    """
    settings = spark.sparkContext.getConf().getAll()
    given = [k.removeprefix(EXECUTOR_ENV) for k, _ in settings if k.startswith(EXECUTOR_ENV)]
    prefix = CREDENTIALS.get(url.partition(":")[0])
    named = [*map(re.escape, given), *([f"{prefix}.*"] if prefix else [])]
    return "|".join([f"(?!{SECRET})({RANK_ENVIRONMENT})", *named])
