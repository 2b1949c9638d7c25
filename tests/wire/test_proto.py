"""The .proto is the protocol's reference: complete, and the same as the code."""

import re
from pathlib import Path

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire import channel, codec, messages, state_codec

SOURCE = Path(__file__).parent.parent.parent / "proto/skfac/v1/preconditioning.proto"
FIELD = re.compile(r"^ +(repeated |optional )?[\w.]+ \w+ = \d+;")
MAPS = {
    pb.Dtype: messages.DTYPES,
    pb.History: messages.HISTORIES,
    pb.DampingSplit: codec._SPLITS,
    pb.OnLate: codec._ON_LATE,
    pb.FactorInverse.Form: codec._FORMS,
    pb.Moment.Form: state_codec._FORMS,
}


def lines() -> list[str]:
    return SOURCE.read_text().splitlines()


def test_every_field_has_a_comment():
    undocumented = [
        line.strip()
        for before, line in zip(lines(), lines()[1:], strict=False)
        if FIELD.match(line)
        and "//" not in line
        and not before.strip().startswith("//")
    ]

    assert undocumented == []


def test_every_call_has_a_comment():
    calls = [
        before
        for before, line in zip(lines(), lines()[1:], strict=False)
        if line.startswith("  rpc ")
    ]

    assert len(calls) == len(
        pb.DESCRIPTOR.services_by_name["PreconditioningService"].methods
    )
    assert all(before.startswith("  //") for before in calls)


def test_every_code_of_an_enum_has_a_meaning():
    for kind, meanings in MAPS.items():
        unspecified, *known = kind.values()
        assert unspecified == 0
        assert list(meanings) == known
        assert len(set(meanings.values())) == len(known)


def test_every_enum_is_read():
    enums = set(pb.DESCRIPTOR.enum_types_by_name.values())
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        enums |= set(message.enum_types)

    assert enums == {kind.DESCRIPTOR for kind in MAPS}


def test_frames_of_all_streams_look_the_same():
    framed = (
        pb.PushSnapshotsRequest,
        pb.StreamPreconditionersResponse,
        pb.ExportStateResponse,
        pb.ImportStateRequest,
    )
    for message in framed:
        numbers = {field.name: field.number for field in message.DESCRIPTOR.fields}
        if message is pb.PushSnapshotsRequest:
            assert numbers.pop("region") == 4
        assert numbers == {"manifest": 1, "checksum": 2, "payload": 3}


def test_numbers_have_no_gaps():
    pending = list(pb.DESCRIPTOR.message_types_by_name.values())
    while pending:
        message = pending.pop()
        pending += message.nested_types
        numbers = [field.number for field in message.fields]
        assert numbers == list(range(1, len(numbers) + 1)), message.name


def test_the_service_is_found_by_its_name():
    assert (
        channel.SERVICE
        in pb.DESCRIPTOR.services_by_name["PreconditioningService"].full_name
    )
