"""Settings that both ends of a gRPC connection must agree on."""

from typing import Final

SERVICE: Final = "skfac.v1.PreconditioningService"

MAX_FRAME_BYTES: Final = 4 * 1024 * 1024
"""The largest message either end accepts, which is also gRPC's default."""

# A peer that answers no ping for this long is gone, even if its socket is open. The
# time is set twice below: without the second name gRPC waits for 60 s. The
# server must allow pings as often as the client sends them, or it hangs up.
_PING_EVERY_MS = 10_000
_PING_TIMEOUT_MS = 20_000

# gRPC's defaults read and write 64 KiB at a time and ping to estimate the bandwidth.
# With these, and with `allocator`, tensors of 4 MiB are 1.4 times as fast. It is also
# what a peer can make the other end hold for each stream that nobody reads: two frames.
_BUFFER_BYTES = 2 * MAX_FRAME_BYTES
_HTTP2_FRAME_BYTES = 16 * 1024 * 1024 - 1  # the largest that HTTP/2 has

_COMMON: Final[list[tuple[str, int]]] = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.lookahead_bytes", _BUFFER_BYTES),
    ("grpc.http2.write_buffer_size", _BUFFER_BYTES),
    ("grpc.http2.max_frame_size", _HTTP2_FRAME_BYTES),
    ("grpc.http2.bdp_probe", 0),
]

CLIENT_OPTIONS: Final = [
    *_COMMON,
    # Else two clients of one process would share one connection.
    ("grpc.use_local_subchannel_pool", 1),
]

SESSION_KEY: Final = "skfac-session"
"""Metadata of `PushSnapshots`: the session that will push, before it does."""

SERVER_OPTIONS: Final = [
    *_COMMON,
    # Connections without a handshake, or without a call, are closed after this long.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
    # Else a second server on the same port would silently take half of the calls.
    ("grpc.so_reuseport", 0),
]
