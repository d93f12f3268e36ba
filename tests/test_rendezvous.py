"""The meeting of a run's processes, each a thread here."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from grok import rendezvous
from grok.errors import GrokError, Lost


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.02)


def outcomes(port: int, *processes: tuple[int, int], timeout: int = 30) -> list[str]:
    """The error of each process, given as its count and index; "" where it was let through."""

    def attend(process: tuple[int, int]) -> str:
        try:
            rendezvous.meet(f"127.0.0.1:{port}", *process, timeout)
        except GrokError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(attend, processes))


def test_all_meet_and_leave_the_port_free(port):
    assert outcomes(port, (3, 2), (3, 0), (3, 1)) == ["", "", ""]
    socket.create_server(("127.0.0.1", port)).close()
    assert outcomes(port, (1, 0)) == [""]


@pytest.mark.parametrize("number", [0, 1])
def test_a_number_given_twice_ends_all(port, number):
    for outcome in outcomes(port, (3, 0), (3, 1), (3, number)):
        assert outcome.startswith("ConfigError: two processes, on ")
        assert f"say that they are process {number} (GROK_PROCESS_ID) of 3" in outcome


def test_another_count_ends_all(port):
    for outcome in outcomes(port, (2, 0), (3, 2)):
        assert outcome.startswith("ConfigError: GROK_NUM_PROCESSES is 2 in process 0 and 3 in")


def test_who_is_missing_is_named(port):
    for outcome in outcomes(port, (4, 0), (4, 2), timeout=1):
        assert outcome == (
            "Lost: not all processes of the run connected within 1 s: of 4, 2 did not "
            "(process 1, 3)."
        )


def test_a_port_in_use(port):
    refusal = pytest.raises(Lost, match=f"cannot listen on port {port}, .* already in use; ano")
    with socket.create_server(("127.0.0.1", port)), refusal:
        rendezvous.meet(f"localhost:{port}", 2, 0, 30)


def test_an_answer_of_another_program(port):
    with ThreadPoolExecutor(1) as pool, socket.create_server(("127.0.0.1", port)) as server:
        pool.submit(greet, server)
        with pytest.raises(Lost, match="another program, or a run that is already under way"):
            rendezvous.meet(f"127.0.0.1:{port}", 2, 1, 30)
        server.shutdown(socket.SHUT_RDWR)


def greet(server: socket.socket) -> None:
    while True:
        with server.accept()[0] as connection:
            connection.sendall(b"220 mail.example ready\r\n")


def test_probes_of_the_port_do_no_harm(port):
    with ThreadPoolExecutor(1) as pool:
        met = pool.submit(outcomes, port, (2, 0))
        for line in (b"", b"GET / HTTP/1.1\r\n", b'{"process": "x"}\n', b"[" * 5000 + b"\n"):
            probe(port, line)
        rendezvous.meet(f"127.0.0.1:{port}", 2, 1, 30)
        assert met.result() == [""]


def probe(port: int, line: bytes) -> None:
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                return connection.sendall(line)
        except ConnectionRefusedError:
            continue


def test_a_host_that_does_not_resolve(port):
    with pytest.raises(Lost, match=r"host name no-such-host\.invalid does not resolve here"):
        rendezvous.meet(f"no-such-host.invalid:{port}", 2, 1, 30)


def test_an_address_that_does_not_lead_to_process_0(port):
    # 127.0.0.1 listens; of 192.0.2.0/24, which is for documentation, nothing is anywhere.
    with pytest.raises(Lost, match=r"process 0 did not find process 0 at 192\.0\.2\.7:"):
        rendezvous.meet(f"192.0.2.7:{port}", 2, 0, 30)
