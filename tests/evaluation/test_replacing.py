"""An evaluation replaces an earlier one with the same key only when it is complete, and can be repeated."""

import itertools
import signal
import subprocess
import sys
import time

import bson
import fiftyone as fo
import pytest
from pymongo.errors import OperationFailure

from fiftyone_mobilesamv2 import evaluate_proposals
from fiftyone_mobilesamv2.errors import StorageError

EARLIER = {"ks": (1, 3), "rank_by": "confidence"}
NEW = {"ks": (2,), "rank_by": "predicted_iou"}
WRITES = ["update", "insert", "delete", "findAndModify"]


def evaluate(dataset, settings, **kwargs):
    return evaluate_proposals(dataset[:4], "proposals", eval_key="ar", progress=False, **settings | kwargs)


def evaluate_detections(dataset, settings):
    return dataset[:4].evaluate_detections(
        "proposals", eval_key="ar", method="proposals", use_masks=True, progress=False, **settings
    )


def state(dataset):
    """All values of the samples in the database except times, and the declared fields."""
    documents = [
        {key: value for key, value in document.items() if key != "last_modified_at"}
        for document in dataset._sample_collection.find({}).sort("_id", 1)
    ]
    return documents, sorted(dataset.get_field_schema(flat=True))


def figures(dataset):
    """What an evaluation has apart from values of samples."""
    results = dataset.load_evaluation_results("ar", cache=False)
    missed = results.missed(k=1).values("ground_truth.detections.id", unwind=True)
    settings = dataset.get_evaluation_info("ar").config
    return str(results.metrics()), results.ypred_ids.tolist(), missed, (settings.ks, settings.rank_by)


def attributes(dataset):
    """The values that the earlier evaluation stored on samples and labels, as FiftyOne loads them."""
    paths = [
        f"{name}.detections.ar{end}" for name in ("ground_truth", "proposals") for end in ("", "_id", "_iou", "_rank")
    ]
    return dataset.values([*paths, "ar_tp", "ar_fp", "ar_fn", "ar_recall_at_1", "ar_recall_at_3"])


@pytest.fixture
def fail_after(mongod):
    """Makes all writes fail after some, as if the database had gone, until it is called without arguments."""
    admin = fo.core.odm.get_db_conn().client.admin

    def fail_after(writes=None, **how):
        mode = "off" if writes is None else {"skip": writes}
        data = {"failCommands": WRITES, **({"errorCode": 96} | how)}
        arguments = {} if writes is None else {"data": data}
        return admin.command("configureFailPoint", "failCommand", mode=mode, **arguments)["count"]

    try:
        fail_after()
    except OperationFailure:
        pytest.skip("needs a mongod with enableTestCommands=1")
    yield fail_after
    fail_after()


@pytest.mark.parametrize("evaluate_again", [evaluate, evaluate_detections])
def test_replacing_equals_a_first_evaluation(small, evaluate_again):
    untouched = state(small)
    evaluate(small, NEW)
    expected, expected_figures = state(small), figures(small)
    small.delete_evaluation("ar")
    assert state(small) == untouched
    evaluate(small, EARLIER)
    held = small.first()
    assert held.ground_truth.detections[0].ar_id == held.proposals.detections[0].id
    results = evaluate_again(small, NEW)
    assert state(small) == expected and figures(small) == expected_figures
    assert small.list_evaluations() == ["ar"] and small.load_evaluation_results("ar") is results
    assert held.ground_truth.detections[0].ar_id == held.proposals.detections[1].id  # a sample in memory
    small.delete_evaluation("ar")
    assert state(small) == untouched


def interrupted_evaluations(small, fail_after, evaluate_again, numbers):
    """Lets the database fail after each of these numbers of writes; tells how often the new run was there then.

    Until it is complete, the earlier one stays, with all its values. The same call then completes.
    """
    untouched = state(small)
    evaluate(small, NEW)
    new, new_figures = state(small), figures(small)
    evaluate(small, EARLIER)
    earlier, earlier_figures, earlier_attributes = state(small), figures(small), attributes(small)
    assert new_figures != earlier_figures
    replaced = []
    for number in numbers:
        fail_after(number)
        try:
            evaluate_again(small, NEW)
        except (OperationFailure, ValueError, StorageError) as error:
            assert "failCommand" in str(error)
        else:
            break
        finally:
            fail_after()
        small.reload()
        assert small.list_evaluations() == ["ar"] and len(list(small)) == 5
        replaced.append(figures(small) != earlier_figures)
        if replaced[-1]:
            assert figures(small) == new_figures
        else:
            assert attributes(small) == earlier_attributes
        evaluate_again(small, NEW)
        assert state(small) == new and figures(small) == new_figures
        evaluate(small, EARLIER)
        assert state(small) == earlier
    small.delete_evaluation("ar")
    assert state(small) == untouched
    return replaced


def test_database_that_fails_before_the_new_run_is_complete(small, fail_after):
    assert interrupted_evaluations(small, fail_after, evaluate, [1]) == [False]


@pytest.mark.slow
@pytest.mark.parametrize("evaluate_again", [evaluate, evaluate_detections])
def test_database_that_fails_after_any_number_of_writes(small, fail_after, evaluate_again):
    replaced = interrupted_evaluations(small, fail_after, evaluate_again, itertools.count())
    assert replaced == sorted(replaced) and replaced.count(False) >= 4 and replaced.count(True) >= 6


@pytest.mark.parametrize(
    ("room", "cause"),
    [(100, "after update is larger than 16777216"), (900, "it has more than")],
    ids=["values of labels", "values of the sample"],
)
def test_sample_that_has_no_room_for_the_new_run_is_named(small, room, cause):
    evaluate(small, EARLIER)
    small.add_sample_field("text", fo.StringField)
    documents, (_, second, *_) = small._sample_collection, small.values("_id")
    size = len(bson.encode(documents.find_one({"_id": second})))
    documents.update_one({"_id": second}, {"$set": {"text": "x" * (16 * 2**20 - size - room)}})
    before = small.get_field_schema(flat=True).keys(), figures(small), attributes(small)
    with pytest.raises(StorageError, match=rf"{second} can't be stored: .*{cause}.*eval_key=None"):
        evaluate(small, NEW | {"ks": range(1, 61)})
    small.reload()
    assert (small.get_field_schema(flat=True).keys(), figures(small), attributes(small)) == before
    documents.update_one({"_id": second}, {"$unset": {"text": ""}})
    evaluate(small, NEW)
    assert small.values("ar_recall_at_2")[:3] == [0.5] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("writes", "is_new"), [(1, False), (5, True)])
def test_killed_process(small, fail_after, writes, is_new):
    """A process is killed while the database carries out one of its writes."""
    evaluate(small, NEW)
    new, new_figures = state(small), figures(small)
    evaluate(small, EARLIER)
    earlier_figures, earlier_attributes = figures(small), attributes(small)
    small.persistent = True
    code = f"""
import fiftyone as fo
from fiftyone_mobilesamv2 import evaluate_proposals
samples = fo.load_dataset({small.name!r})[:4]
print("ready", flush=True)
input()
evaluate_proposals(samples, "proposals", eval_key="ar", progress=False, **{NEW!r})
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        entered = fail_after(writes, blockConnection=True, blockTimeMS=1000, errorCode=None)
        process.stdin.write("\n")
        process.stdin.flush()
        admin = fo.core.odm.get_db_conn().client.admin
        admin.command("waitForFailPoint", "failCommand", timesEntered=entered + 1, maxTimeMS=60_000)
        process.send_signal(signal.SIGKILL)
        process.wait()
        fail_after()
    time.sleep(1.5)
    small.reload()
    assert small.list_evaluations() == ["ar"] and len(list(small)) == 5
    assert figures(small) == (new_figures if is_new else earlier_figures)
    if not is_new:
        assert attributes(small) == earlier_attributes
    evaluate(small, NEW)
    assert state(small) == new and figures(small) == new_figures
