import fiftyone as fo
from fiftyone.core.odm import get_db_client


def test_the_database_in_use_is_the_fixtures(mongod, dataset):
    host, port = get_db_client().address
    assert f"{host}:{port}" in mongod
    assert dataset.name in fo.list_datasets()
    assert not dataset.persistent
