"""A storage server on this machine, in memory, for `gs://test`: PORT is the argument.

The package gcp-storage-emulator, with a header that TensorStore wants and it leaves out.
"""

import contextlib
import sys

from gcp_storage_emulator.handlers import objects

plain = objects.download


def download(request, response, storage, *args, **kwargs):
    """What was asked for, with its generation."""
    names = request.params["bucket_name"], request.params["object_id"]
    with contextlib.suppress(Exception):  # no such object: the plain answer says so
        response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]
    return plain(request, response, storage, *args, **kwargs)


objects.download = download

from gcp_storage_emulator.server import create_server  # noqa: E402 - it keeps the function

create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="test").run()
