"""An emulator of Google's storage in this process."""

import contextlib
import json
from collections.abc import Iterator
from http import HTTPStatus
from http.server import HTTPServer
from typing import Any

import gcp_storage_emulator.server
import pytest
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import Response, create_server

from grok.storage import remote

# Bytes of files in each answer.
DOWNLOADED: list[int] = []


@contextlib.contextmanager
def bucket() -> Iterator[Any]:
    """The client of an empty gs://bucket; the environment names the emulator, also to Orbax,
    TensorStore, and processes that are started."""
    with pytest.MonkeyPatch.context() as patch:
        # Of the connections that a client opens at once, more than five would have to be repeated,
        # at intervals of up to a minute.
        patch.setattr(HTTPServer, "request_queue_size", 256)
        server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        server.start()
    # Port 0 took a free one.
    url = f"http://127.0.0.1:{server._api._httpd.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "download", _download)
        for _, handlers in gcp_storage_emulator.server.HANDLERS:
            for method, handler in handlers.items():
                if handler in (objects.insert, objects.delete):
                    patch.setitem(handlers, method, _conditional(handler))
        patch.setattr(Response, "write_file", _write_file)
        patch.setattr(gcp_storage_emulator.server, "_read_data", _read_data)
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
        try:
            yield remote("gs://bucket")[0]
        finally:  # its thread would outlive a command that fails
            server.stop()


def _download(request, response, storage, download=objects.download) -> None:
    """Google tells a file's generation with its content, which TensorStore asks for when it
    replaces a file that it has read, and answers requests for the end of a file, where TensorStore
    finds the index of chunks; the emulator does neither."""
    names = request.params["bucket_name"], request.params["object_id"]
    with contextlib.suppress(NotFound):
        response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]
        _, _, last = (request.get_header("range", None) or "").partition("bytes=-")
        if last:
            content = storage.get_file(*names)
            first = max(0, len(content) - int(last))
            response.status = HTTPStatus.PARTIAL_CONTENT
            response["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            response.write_file(content[first:])
            return
    download(request, response, storage)


def _conditional(handler):
    """Google carries out a request for a file of another generation than it names not at all; the
    emulator ignores the condition."""

    def handle(request, response, storage):
        (wanted,) = request.query.get("ifGenerationMatch", [None])
        key = request.params.get("object_id") or request.query.get("name", [None])[0]
        key = key or request.data["meta"]["name"]
        generation = "0"
        with contextlib.suppress(NotFound):
            generation = storage.get_file_obj(request.params["bucket_name"], key)["generation"]
        if wanted not in (None, generation):
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        handler(request, response, storage)

    return handle


def _write_file(response, content, *arguments, write_file=Response.write_file, **options) -> None:
    DOWNLOADED.append(len(content))
    write_file(response, content, *arguments, **options)


def _read_data(handler, query, read_data=gcp_storage_emulator.server._read_data):
    """The client ends a file's bytes by a line feed; the emulator's parser, made for mail, would
    take a carriage return before it, though it is the file's last byte, for a part of that."""
    separator, end = b"--==0==", b"\n--==0==--"
    if "==0==" not in handler.headers.get("Content-Type", ""):
        return read_data(handler, query)
    raw = gcp_storage_emulator.server._read_raw_data(handler)
    _, metadata, content = raw.split(separator, 2)
    return {
        "meta": json.loads(metadata.partition(b"\n\n")[2]),
        "content": content.partition(b"\n\n")[2].removesuffix(end),
        "content-type": "application/octet-stream",
    }
