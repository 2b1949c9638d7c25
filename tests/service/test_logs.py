"""Whoever logs never waits for whoever reads, and what is lost is counted."""

import json
import logging
import os
import threading

import pytest

from skfac.service import logs
from skfac.service.logs import JsonFormatter, QueuedLogs
from skfac.v1 import preconditioning_pb2 as pb
from tests.support.raw_client import RawClient, spec_of
from tests.support.servers import LONG_S, ServerProcess

PIPE_BYTES = 65536


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def logger_of(handler: logging.Handler) -> logging.Logger:
    logger = logging.Logger("made")  # of nobody else
    logger.addHandler(handler)
    return logger


def lines_of(end: int, enough) -> list[str]:
    text = ""
    while not enough(lines := text.splitlines()):
        text += os.read(end, PIPE_BYTES).decode()
    return lines


def test_lines_come_in_order_and_whole(pipe):
    reader, writer = pipe
    handler = QueuedLogs(writer, JsonFormatter())
    logger = logger_of(handler)
    try:
        raise ValueError("wrong")
    except ValueError:
        logger.exception("It is %s.", "bad")
    logger.info("é\ud800")  # which no encoding has
    handler.flush()

    first, second = (json.loads(x) for x in lines_of(reader, lambda x: len(x) == 2))
    assert first["message"] == "It is bad."
    assert "ValueError: wrong" in first["error"]
    assert second["message"].startswith("é")


def test_a_reader_that_stops_costs_lines_and_a_note(pipe, monkeypatch):
    monkeypatch.setattr(logs, "LINES_KEPT", 10)
    monkeypatch.setattr(logs, "_LAST_WORDS_S", 0.05)
    reader, writer = pipe
    handler = QueuedLogs(writer, logging.Formatter("%(message)s"))
    lost: list[None] = []
    handler.count_losses(lambda: lost.append(None))
    logger = logger_of(handler)
    long = "x" * PIPE_BYTES  # with its end more than the pipe holds
    logger.info(long)
    handler.flush()  # the writer has it, and is stuck
    for number in range(25):
        logger.info("line %d", number)
    handler.flush()  # does not wait for ever

    assert len(lost) == 15
    kept = lines_of(reader, lambda x: x and x[-1] == "line 9" and x[0] == long)
    assert kept[1:] == [f"line {number}" for number in range(10)]
    logger.info("again")
    note, line = lines_of(reader, lambda x: len(x) == 2)
    assert note.startswith("15 lines of the log are lost")
    assert line == "again"


def test_a_record_that_cannot_be_formatted_does_not_stop_its_maker(
    pipe, capsys, monkeypatch
):
    monkeypatch.setattr(logging, "raiseExceptions", True)  # logging's own default
    reader, writer = pipe
    logger = logger_of(QueuedLogs(writer, logging.Formatter("%(message)s")))
    logger.info("%d", "not a number")
    logger.info("after it")

    assert lines_of(reader, lambda x: len(x) == 1) == ["after it"]
    assert "not a number" in capsys.readouterr().err


def test_a_reader_that_is_gone_costs_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    handler = QueuedLogs(writer, logging.Formatter("%(message)s"))
    logger_of(handler).info("nobody")
    handler.flush()
    os.close(writer)

    assert any(t.name == "skfac-logs" and t.is_alive() for t in threading.enumerate())


@pytest.mark.timeout(180)
def test_a_server_whose_log_nobody_reads_serves_and_stops():
    with ServerProcess(log_level="info") as server:
        name = "long name " * 19  # about half a KiB a session in the log
        for number in range(200):
            with RawClient(server.address, spec_of(f"{name}{number}")) as client:
                client.stub.CloseSession(closing(client), timeout=LONG_S)
        with RawClient(server.address, spec_of("job")) as client:
            assert client.versions_of(3)
        server.process.terminate()
        assert server.process.wait(LONG_S) == 0


def closing(client: RawClient) -> pb.CloseSessionRequest:
    return pb.CloseSessionRequest(session_id=client.grant.session_id, rank=0)
