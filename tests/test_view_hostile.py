# SPDX-License-Identifier: Apache-2.0
"""Pages of other sites can't talk to the viewer, and no page can make it take any amount of memory."""

import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import msgspec
import pytest
from view_models import CPU, PROTOCOL, connected, wait, write_many
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from igae.viewer import Followed, Session, Viewer


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    folder = tmp_path_factory.mktemp("page") / "export"
    write_many(folder, 3)
    viewer = Viewer(Followed(str(folder), [], CPU), port=0)
    yield viewer
    viewer.close()


@pytest.fixture
def page(viewer: Viewer) -> Iterator[tuple[ClientConnection, Session]]:
    with connected(viewer) as found:
        yield found


def send(socket: ClientConnection, kind: str, **values: object) -> None:
    socket.send(msgspec.msgpack.encode({"type": kind, **values}))


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example"]
)
def test_pages_of_others_are_refused(viewer: Viewer, origin: str) -> None:
    url = viewer.url.replace("http", "ws")
    with pytest.raises(InvalidStatus) as refused:
        connect(url, origin=origin, subprotocols=PROTOCOL)  # type: ignore[arg-type]
    assert refused.value.response.status_code == 403
    assert not viewer.sessions


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8080", 403),
        ("localhost:9", 200),
        ("[::1]:9", 200),
        ("10.0.0.7", 200),
    ],
)
def test_names_that_lead_here(viewer: Viewer, host: str, status: int) -> None:
    """A foreign name may be made to lead to this machine; behind a tunnel the port is another one."""
    request = urllib.request.Request(viewer.url, headers={"Host": host, "Origin": f"http://{host}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = answer.status
    except urllib.error.HTTPError as error:
        found = error.code
    assert found == status


def test_what_a_page_sends_is_clamped(viewer: Viewer, page: tuple[ClientConnection, Session]) -> None:
    socket, session = page
    for value, frames in ((10**7, 30 * 24), (-5, 24)):
        send(socket, "GuiUpdateMessage", uuid=session.seconds._impl.uuid, updates={"value": value})
        wait(lambda value=value: session.seconds.value == value)
        made: list[int] = []
        session._cameras_of_video = lambda count, made=made: made.append(count) or []  # type: ignore[func-returns-value]
        with pytest.raises(ValueError, match="at least one array"):
            session._save_video()
        assert made == [frames]
    for value in (1e9, float("nan"), -1.0):
        send(socket, "GuiUpdateMessage", uuid=session.angle._impl.uuid, updates={"value": value})
        wait(lambda value=value: repr(session.angle.value) == repr(value))
        assert 0.2 < float(session.camera().intrinsics[0, 0]) < 12
    send(socket, "GuiUpdateMessage", uuid=session.choice._impl.uuid, updates={"value": "x" * 10**6})
    wait(lambda: len(session.choice.value) == 10**6)
    time.sleep(0.2)
    assert session.name in viewer.subject.names


def test_one_job_at_a_time(page: tuple[ClientConnection, Session]) -> None:
    _, session = page
    with session._saving, pytest.raises(ValueError, match="something is being saved already"):
        session._save(session._save_picture)
    session._save(lambda: None)


def test_uploads_are_counted_before_they_are_complete(page: tuple[ClientConnection, Session]) -> None:
    socket, session = page
    handles = session.client.gui._gui_input_handle_from_uuid
    uuid = next(uuid for uuid, handle in handles.items() if type(handle).__name__ == "GuiUploadButtonHandle")
    uploads = session.client.gui._current_file_upload_states

    def start(name: str, size: int) -> None:
        values = {"source_component_uuid": uuid, "transfer_uuid": name, "filename": "x", "mime_type": "x"}
        send(socket, "FileTransferStartUpload", **values, part_count=1000, size_bytes=size)

    start("small", 1000)
    wait(lambda: "small" in uploads)
    for part in range(40):  # 40 MB in a file that claims 1000 bytes
        values = {"source_component_uuid": uuid, "transfer_uuid": "small", "part_index": part}
        send(socket, "FileTransferPart", **values, content=bytes(1 << 20))
    wait(lambda: uploads["small"]["transferred_bytes"] == 40 << 20)
    assert sum(map(len, uploads["small"]["parts"].values())) <= 16 << 20
    start("another", 1000)
    wait(lambda: "another" in uploads)
    assert list(uploads) == ["another"]
    failed: list[str] = []
    session.fail = lambda error, title="": failed.append(str(error))  # type: ignore[method-assign]
    start("large", 17 << 20)
    wait(lambda: failed)
    assert failed == ["the file is too large for a camera path"] and "large" not in uploads


def test_large_messages_end_the_connection(viewer: Viewer) -> None:
    with connect(viewer.url.replace("http", "ws"), subprotocols=PROTOCOL, max_size=None, close_timeout=1) as socket:  # type: ignore[arg-type]
        with pytest.raises(ConnectionClosed):
            socket.send(bytes(8 << 20))
            for _ in range(1000):
                socket.recv(timeout=20)
