"""The model store on S3: moto's server, over HTTP, through s3fs. Shards lie in a shared directory.

That Spark itself writes to S3 needs Hadoop's own S3 files, which PySpark does not bring.
"""

import io
import json
import threading

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import DomainDispatcherApplication, ThreadedMotoServer, create_backend_app
from werkzeug.serving import make_server

import spark_mnist
from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.ranks import batches
from spark_mnist.store import filesystem, leases, model_store

pytestmark = pytest.mark.ranks

CACHE = "petastorm.spark.converter.parentCacheDirUrl"
STORE = "s3://models/team"
OPTIONS = {"batch_size": 16, "num_proc": 2, "store": STORE, "verbose": 0}


@pytest.fixture(scope="module")
def server():
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """An empty bucket, to which s3fs and boto3 find the way as in production: by environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    made = boto3.resource("s3").create_bucket(Bucket="models")
    yield made
    made.objects.all().delete()
    made.delete()


@pytest.fixture
def shared(spark, tmp_path):
    spark.conf.set(CACHE, f"file://{tmp_path}/shared")
    yield tmp_path / "shared"
    spark.conf.unset(CACHE)


def test_two_ranks_train_continue_and_score(digits, bucket, shared):
    spark_mnist.fit(digits, "m", epochs=6, **OPTIONS)
    fit = spark_mnist.fit(digits, "m", epochs=6, continuous=True, **OPTIONS)
    assert [record.epoch for record in fit.records] == list(range(7, 13))
    assert model_store.Store(STORE).versions("m") == [1, 2]
    keys = {found.key for found in bucket.objects.all()}
    assert {"team/m/v000001/manifest.json", "team/m/v000002/weights.npz"} <= keys
    assert not any(".work-" in key for key in keys)
    assert [path for path in shared.rglob("*") if path.is_file()] == []
    found = spark_mnist.predict(digits, "m", interpret=True, store=STORE)
    right = found.where("label = interpreted").count() / digits.count()
    (row,) = spark_mnist.evaluate(digits, "m", rate=1, store=STORE).collect()
    assert row["metrics"]["accuracy"] == right > 0.9


@pytest.fixture
def without_conditional_writes(server):
    """A bucket of a store that answers them with 501, as some that speak S3's language do."""

    def answer(environ, start):
        if "HTTP_IF_NONE_MATCH" in environ:
            body = b"<Error><Code>NotImplemented</Code><Message>A header you sent</Message></Error>"
            start("501 Not Implemented", [("Content-Type", "application/xml")])
            return [body]
        return app(environ, start)

    app = DomainDispatcherApplication(create_backend_app)
    proxy = make_server("127.0.0.1", 0, answer, threaded=True)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()


def test_a_store_without_conditional_writes_is_refused(
    digits, without_conditional_writes, bucket, shared, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", without_conditional_writes)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(errors.ClusterError, match="cannot write a file only where there is none"):
        spark_mnist.fit(digits, "m", **OPTIONS)
    assert model_store.Store(STORE).names() == []


def test_writers_that_meet_each_get_a_version_of_their_own(bucket):
    store = model_store.Store(STORE)
    both = threading.Barrier(4)
    numbers = []

    def publish(number):
        both.wait()
        numbers.append((store.publish("m", {"weights": bytes([number])}, lambda _: {}), number))

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(version for version, _ in numbers) == [1, 2, 3, 4] == store.versions("m")
    for version, number in numbers:
        assert store.read("m", version)[1] == {"weights": bytes([number])}


def test_a_version_is_seen_though_its_directory_was_listed_before(bucket):
    store = model_store.Store(STORE)
    store.publish("m", {"weights": b"1"}, lambda _: {})
    bucket.put_object(
        Key=f"team/m/v000002/{model_store.CLAIM}", Body=leases.create()
    )  # another host's
    assert store.resolve_version("m") == 1
    body = json.dumps({"format": model_store.FORMAT, "files": {}})
    bucket.put_object(Key=f"team/m/v000002/{model_store.MANIFEST}", Body=body)
    assert store.resolve_version("m") == model_store.Store(STORE).resolve_version("m") == 2


def test_what_a_killed_fit_left_is_swept(bucket):
    store = model_store.Store(STORE)
    store.publish("m", {"weights": b"1"}, lambda _: {})
    gone = json.dumps(json.loads(leases.create()) | {"started": 1})
    left = [f"m/.work-{'0' * 32}", "m/v000002"]
    for path, note in zip(left, (model_store.OWNER, model_store.CLAIM), strict=True):
        bucket.put_object(Key=f"team/{path}/{note}", Body=gone)
    with store.work("m") as mine:
        filesystem.Files(mine).write(model_store.OWNER, leases.create())
        assert store.remove_abandoned("m") == left
        assert filesystem.Files(mine).exists(model_store.OWNER)
    assert {found.key for found in bucket.objects.all()} == {
        f"team/m/v000001/{name}" for name in ("weights", model_store.MANIFEST, model_store.CLAIM)
    }


def test_versions_are_deleted(bucket):
    store = model_store.Store(STORE)
    store.publish("m", {"weights": b"1"}, lambda _: {})
    store.publish("m", {"weights": b"2"}, lambda _: {})
    store.remove("m", [1])
    assert store.versions("m") == [2]
    assert store.publish("m", {"weights": b"3"}, lambda _: {}) == 3
    store.remove("m", [2, 3])
    assert store.names() == []


def test_a_file_that_was_changed_is_refused(bucket):
    store = model_store.Store(STORE)
    store.publish("m", {"weights": b"1"}, lambda _: {})
    bucket.put_object(Key="team/m/v000001/weights", Body=b"2")
    with pytest.raises(errors.DamagedModel, match="differs from its sha256"):
        store.read("m", 1)


def test_a_rank_reads_its_row_groups_from_s3(bucket):
    """Through Petastorm. Spark wrote the shards elsewhere: here they are copied."""
    features = np.arange(40 * 4, dtype="<f4").reshape(40, 4)
    for number in range(2):
        rows = features[number::2]
        table = pa.table(
            {
                "features": [row.tobytes() for row in rows],
                "label": pa.array(rows[:, 0] // 4, pa.int32()),
            }
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        bucket.put_object(Key=f"shards/part-{number}.parquet", Body=buffer.getvalue())
    shards = plan.Shards(
        urls=tuple(f"s3://models/shards/part-{number}.parquet" for number in range(2)),
        rows=40,
        encoding=plan.Encoding("float32", 1.0, 4),
    )
    for rank in range(2):
        shard = batches.read(shards, rank=rank, ranks=2, memory=1 << 20)
        ((content, labels),) = shard.parts()
        np.testing.assert_array_equal(content, features[rank::2])
        assert labels.tolist() == list(range(rank, 40, 2))
